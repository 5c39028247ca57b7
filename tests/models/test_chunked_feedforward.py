"""A feed-forward in chunks: the same values and gradients in less memory, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from restless import RoutedConfig
from small_models import batch, blocks_of, classifier
from torch import Tensor

from subquad.benchmark.memory import allocated_peak_bytes
from subquad.build import feedforward_config, list_feedforwards
from subquad.registry import register

LABELS = torch.tensor([0, 1, 2])
FEEDFORWARDS = [name for name in list_feedforwards() if feedforward_config(name).position_wise]


@pytest.mark.parametrize("residual", ["standard", "reversible"])
@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
@pytest.mark.parametrize("name", FEEDFORWARDS)
def test_values_and_gradients_are_those_of_the_whole(name: str, chunk: int, residual: str) -> None:
    results = []
    for size in (0, chunk):
        model = classifier(feedforward=name, feedforward_chunk=size, residual=residual).double().train()
        tokens, attention = batch()
        output = model(tokens, attention_mask=attention, labels=LABELS)
        output.loss.backward()
        results.append((output.logits, {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FEEDFORWARDS)
def test_a_position_wise_feedforward_keeps_its_promise(name: str) -> None:
    module = feedforward_config(name).build(8).double().train()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    whole, parts = module(x), [module(part) for part in x.split(2, dim=1)]
    torch.testing.assert_close(whole.y, torch.cat([part.y for part in parts], dim=1), rtol=1e-12, atol=1e-12)
    assert whole.aux_loss is None


def test_dropout_is_the_same_when_a_chunk_is_computed_again() -> None:
    model = classifier(feedforward_chunk=5, dropout=0.5, num_hidden_layers=1).double().train()
    (block,), x = blocks_of(model.model), torch.randn(2, 13, 16, dtype=torch.float64, requires_grad=True)

    def upstream() -> Tensor:
        torch.manual_seed(1)
        return block.feed_forward(x, None).y.square().sum()

    (found,) = torch.autograd.grad(upstream(), x)
    with torch.no_grad():
        step = 1e-6 * torch.randn_like(x)
        x += step
        above = upstream()
        x -= 2 * step
        below = upstream()
    assert float((found * step).sum()) == pytest.approx(float(above - below) / 2, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_less_memory_is_held_at_the_peak(training: bool) -> None:
    peaks = []
    for chunk in (0, 32):
        model = classifier(feedforward_chunk=chunk, num_hidden_layers=1, intermediate_size=512).train(training)
        (block,), x = blocks_of(model.model), torch.randn(4, 512, 16, requires_grad=training)

        def step(block: Any = block, x: Tensor = x) -> None:
            y = block.feed_forward(x, None).y
            if training:
                y.sum().backward()

        with torch.set_grad_enabled(training):
            peaks.append(allocated_peak_bytes(step))
    assert peaks[1] < 0.25 * peaks[0]


def test_the_price_keeps_the_input_and_one_chunk() -> None:
    whole, chunked = (classifier(feedforward_chunk=size, num_hidden_layers=1).model.cost(20) for size in (0, 4))
    assert (chunked.flops, chunked.parameters) == (whole.flops, whole.parameters)
    saved = 4 * (21 * (16 + 2 * 24) - 21 * 16 - 4 * (16 + 2 * 24))
    assert whole.activation_bytes - chunked.activation_bytes == saved


def test_a_feedforward_whose_tokens_depend_on_each_other_is_refused() -> None:
    register("routed")(RoutedConfig)
    with pytest.raises(ValueError, match=r"routed: doesn't promise that a token's .*so feedforward_chunk=4 could"):
        classifier(feedforward="routed", feedforward_chunk=4)
    classifier(feedforward="routed")


@torch.no_grad()
def test_without_gradients_nothing_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = classifier(feedforward_chunk=5, num_hidden_layers=1), []
    (block,) = blocks_of(model.model)
    assert block.feedforward is not None
    block.feedforward.register_forward_hook(lambda *call: calls.append(call))
    model(torch.ones(1, 13, dtype=torch.int64))
    assert len(calls) == 3
