"""Reversible residuals: the same function and gradients as plain autograd of two streams, in memory without depth."""

from __future__ import annotations

import copy
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from restless import RestlessConfig, RoutedConfig
from small_models import CAUSAL, MIXERS, batch, blocks_of, build, classifier, small
from torch import Tensor
from transformers import Trainer, TrainingArguments

from subquad import receipts, traits
from subquad.benchmark.memory import allocated_peak_bytes, saved_bytes
from subquad.interface import Mixed
from subquad.models import (
    SubquadCache,
    SubquadForSeq2SeqLM,
    SubquadForSequenceClassification,
    reversible,
)
from subquad.models.stack import StackInputs
from subquad.registry import MIXERS as REGISTERED
from subquad.registry import register

PLACEMENTS = {name: each.placement for name, each in REGISTERED.items()}
BIDIRECTIONAL = {name: mixer for name, mixer in MIXERS.items() if PLACEMENTS.get(name) == "sublayer"}
CAUSALLY = {name: small(name) for name in CAUSAL if PLACEMENTS[name] == "sublayer"}
CAUSALLY["reformer"] = {"name": "reformer", "chunks": "bucket", "chunk": 4, "buckets": 4}
SUBLAYERS: dict[str, dict[str, Any]] = {name: {"mixer": mixer} for name, mixer in BIDIRECTIONAL.items()}
SUBLAYERS["a mixed list"] = {"mixer": list(BIDIRECTIONAL.values())}
SUBLAYERS["tied"] = {"mixer": small("linformer") | {"sharing": "layerwise"}}
SUBLAYERS |= {
    f"{name}, causal": {"mixer": mixer, "causal": True, "pooling": "mean"}
    for name, mixer in {**CAUSALLY, "a mixed list": list(CAUSALLY.values())}.items()
}
BY_SUBLAYER = pytest.mark.parametrize("changes", SUBLAYERS.values(), ids=SUBLAYERS)
TOPK_OF_8 = {"mixer": {"name": "topk", "top_k": 8}}
LABELS = torch.tensor([0, 1, 2])


@pytest.fixture
def restless() -> dict[str, Any]:
    """Layers that draw, choose, change their buffers and add to the loss."""
    register("restless")(RestlessConfig)
    register("routed")(RoutedConfig)
    return {"mixer": "restless", "feedforward": "routed"}


def two_streams(**changes: Any) -> SubquadForSequenceClassification:
    return classifier(residual="reversible", **changes).double().train()


def loss_of(model: SubquadForSequenceClassification) -> Tensor:
    tokens, attention = batch()
    torch.manual_seed(1)
    return model(tokens, attention_mask=attention, labels=LABELS).loss


def gradients_of(model: SubquadForSequenceClassification, *, backwards: int = 1) -> dict[str, Tensor | None]:
    model.zero_grad()
    for _ in range(backwards):
        loss_of(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_plain_autograd_agrees(model: SubquadForSequenceClassification, *, backwards: int = 1) -> None:
    """Loss, gradients, buffers and the state of the generator are those of the definition."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = gradients_of(model, backwards=backwards), loss_of(model).detach(), torch.rand(2)
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reversible, "couple_reversibly", reversible.couple)
        expected = gradients_of(model, backwards=backwards), loss_of(model).detach(), torch.rand(2)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(after, dict(model.named_buffers()), rtol=1e-10, atol=1e-12)


@BY_SUBLAYER
def test_gradients_are_those_of_plain_autograd(changes: dict[str, Any]) -> None:
    assert_plain_autograd_agrees(two_streams(**changes, dropout=0.3))


def test_whatever_a_layer_draws_chooses_and_changes_is_the_same_in_the_recompute(restless: dict[str, Any]) -> None:
    model = two_streams(**restless, dropout=0.3)
    assert_plain_autograd_agrees(model, backwards=2)
    assert float(model.get_buffer("model.blocks.0.mixer.calls")) == 3  # not once more in each backward pass


def test_the_recompute_chooses_as_the_forward_pass_did_however_rounding_turns() -> None:
    x, directions, chosen = torch.randn(2, 30, 4), torch.randn(4, 5), []

    def mix(stream: Tensor) -> Mixed:
        rounded = stream + 0.3 * len(chosen)  # as if what comes back were far off
        chosen.append((rounded @ directions).argmax(dim=-1))
        return Mixed(stream * chosen[-1][..., None])

    streams = reversible.Streams(x, x.clone().requires_grad_())
    reversible.couple_reversibly([reversible.Sublayer((), mix)], streams).second.sum().backward()
    assert not torch.equal(((x + 0.3) @ directions).argmax(dim=-1), chosen[0])
    assert torch.equal(chosen[1], chosen[0])


def test_rounding_stays_small_over_twelve_layers(restless: dict[str, Any]) -> None:
    model = two_streams(**restless, hidden_size=64, num_hidden_layers=12).float()
    tokens = torch.randint(1, 11, (8, 40), generator=torch.Generator().manual_seed(0))
    gradients = []
    for couple in (reversible.couple_reversibly, reversible.couple):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reversible, "couple_reversibly", couple)
            same = deepcopy(model)
            torch.manual_seed(1)
            same(tokens).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in same.parameters() if parameter.grad is not None])
    for found, expected in zip(*gradients, strict=True):
        assert float((found - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-5


def test_frozen_parameters_get_no_gradient_and_change_no_other(restless: dict[str, Any]) -> None:
    model = two_streams(mixer=["full", "restless"], feedforward=["routed", "mlp"])
    frozen = [model.model.embedding, model.model.blocks[0], blocks_of(model.model)[1].mixer]
    for module in frozen:
        module.requires_grad_(False)
    assert_plain_autograd_agrees(model)
    gradients = gradients_of(model)
    assert all(gradients[f"model.blocks.0.{name}"] is None for name, _ in model.model.blocks[0].named_parameters())
    assert gradients["model.blocks.1.feedforward.expand.weight"] is not None


def test_without_trained_parameters_there_is_no_graph() -> None:
    model = two_streams()
    model.model.requires_grad_(False)
    tokens, _ = batch()
    assert not model.model(tokens).last_hidden_state.requires_grad


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_layers_without_feedforward_serve_the_streams_in_turn(depth: int) -> None:
    model = two_streams(feedforward=None, num_hidden_layers=depth)
    assert_plain_autograd_agrees(model)
    blocks, streams = blocks_of(model.model), [torch.randn(2, 5, 16, dtype=torch.float64)] * 2
    x = streams[0]
    for index, block in enumerate(blocks):
        assert block.mixer_norm is not None
        streams[index % 2] = streams[index % 2] + block.mixer(block.mixer_norm(streams[(index + 1) % 2])).y
    y = reversible.run_reversibly(model.model.blocks, x, StackInputs()).x
    torch.testing.assert_close(y, sum(streams) / 2, rtol=1e-12, atol=1e-12)


def test_a_layer_is_the_pair_of_sums_of_the_paper() -> None:
    model = two_streams(num_hidden_layers=1)
    (block,), x1, x2 = blocks_of(model.model), *torch.randn(2, 2, 5, 16, dtype=torch.float64)
    assert block.mixer_norm is not None
    assert block.feedforward is not None
    assert block.feedforward_norm is not None
    y1 = x1 + block.mixer(block.mixer_norm(x2)).y
    y2 = x2 + block.feedforward(block.feedforward_norm(y1)).y
    for couple in (reversible.couple, reversible.couple_reversibly):
        streams = couple(reversible.sublayers_of(block, StackInputs()), reversible.Streams(x1, x2))
        torch.testing.assert_close((streams.first, streams.second), (y1, y2), rtol=1e-12, atol=1e-12)


@BY_SUBLAYER
def test_evaluation_is_the_same_function_with_and_without_gradients(changes: dict[str, Any]) -> None:
    model, (tokens, attention) = classifier(**changes, residual="reversible").double(), batch()
    with torch.no_grad():
        expected = model(tokens, attention_mask=attention)
    found = model(tokens, attention_mask=attention)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
    assert found.logits.requires_grad
    with torch.no_grad():
        states = model.model(tokens, attention_mask=attention, output_hidden_states=True).hidden_states
    tokens_of_stream = 13 + model.model.prepended
    assert [state.shape for state in states] == [(3, tokens_of_stream, 16)] * 4


def test_a_saved_model_gives_the_same_logits_and_has_the_names_of_a_standard_one(tmp_path: Path) -> None:
    model, (tokens, attention) = classifier(residual="reversible"), batch()
    model.save_pretrained(tmp_path)
    loaded = SubquadForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.residual == "reversible"
    assert torch.equal(loaded(tokens, attention).logits, model(tokens, attention).logits)
    assert model.state_dict().keys() == classifier().state_dict().keys()


def test_the_graph_can_be_gone_through_twice(restless: dict[str, Any]) -> None:
    model = two_streams(**restless, dropout=0.3)
    loss, parameters = loss_of(model), [p for n, p in model.named_parameters() if "restless" not in n]
    first = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters, allow_unused=True), first, rtol=0, atol=0)


def bytes_kept(depth: int, residual: str, **changes: Any) -> int:
    model = classifier(residual=residual, num_hidden_layers=depth, hidden_size=64, **changes).train().model
    x = torch.randn(32, 40, 64, requires_grad=True)
    return saved_bytes(lambda: model(inputs_embeds=x), model.parameters())


@pytest.mark.parametrize("changes", [*SUBLAYERS.values(), TOPK_OF_8], ids=[*SUBLAYERS, "topk of 8"])
def test_what_is_kept_does_not_grow_with_the_depth(changes: dict[str, Any]) -> None:
    one, twelve = (bytes_kept(depth, "reversible", **changes, dropout=0.1) for depth in (1, 12))
    assert twelve <= 1.3 * one


def test_what_standard_layers_keep_grows_with_the_depth() -> None:
    assert bytes_kept(12, "standard", dropout=0.1) > 8 * bytes_kept(1, "standard", dropout=0.1)


HEADS, TOKENS = 32 * 2, 41
"""Of all examples of `bytes_kept`; the learned vector included."""
CHOOSING = {
    "topk of 32": ({"name": "topk", "top_k": 32}, HEADS * TOKENS * (32 + 1)),  # indices, and whether there is a tie
    "topk of all": ({"name": "topk", "top_k": TOKENS}, 0),
    "routing": (
        {"name": "routing", "clusters": 4, "window": 30},
        HEADS * 2 * (4 * 30 + TOKENS)  # members and labels, of queries and keys
        + 4 * 2 * 4 * (32 + 32 + 1),  # the centroids as they were found: means, sums, counts, of two heads
    ),
    "reformer": ({"name": "reformer", "chunk": 4, "rounds": 4}, HEADS * 4 * TOKENS),
}


@pytest.mark.parametrize(("mixer", "chosen"), CHOOSING.values(), ids=CHOOSING)
def test_a_layer_more_keeps_its_choices_and_two_states_of_the_generator(mixer: Any, chosen: int) -> None:
    """Choices must be kept, since rounding may turn them in the recompute: a byte for each index into 41 keys."""
    one, two = (bytes_kept(depth, "reversible", mixer=mixer) for depth in (1, 2))
    assert two - one == 2 * torch.get_rng_state().nbytes + chosen


def test_what_is_held_at_once_does_not_grow_with_the_depth_but_for_gradients() -> None:
    peaks = []
    for depth in (1, 12):
        model = classifier(residual="reversible", num_hidden_layers=depth, dropout=0.1).train()
        tokens = torch.ones(32, 40, dtype=torch.int64)
        peak = allocated_peak_bytes(lambda model=model, tokens=tokens: model(tokens).logits.sum().backward())
        peaks.append(peak - sum(parameter.nbytes for parameter in model.parameters()))
    assert peaks[1] <= 1.3 * peaks[0]


def test_the_price_keeps_two_streams_and_one_sublayer() -> None:
    standard, reversed_ = classifier(mixer="local"), classifier(mixer="local", residual="reversible")
    price, whole = reversed_.model.cost(20), standard.model.cost(20)
    assert (price.flops, price.parameters) == (whole.flops, whole.parameters)
    dims = reversed_.config.mixer_dims(0, prepended=1)
    mixer = reversed_.config.layer_mixers()[0].cost(dims, 21, 4).activation_bytes
    feedforward = 4 * 21 * (16 + 2 * 24)
    assert price.activation_bytes == 2 * 4 * 21 * 16 + max(mixer, feedforward)


def test_the_price_of_a_decoder_keeps_its_source_besides() -> None:
    decoder = build(SubquadForSeq2SeqLM, mixer="full", residual="reversible").decoder
    dims = decoder.config.mixer_dims(0).of_cross_mixer(26)
    most = decoder.config.layer_cross_mixers()[0].cost(dims, 7, 4).activation_bytes
    assert decoder.cost(7, context_length=26).activation_bytes == 4 * (2 * 7 + 26) * 16 + most


@BY_SUBLAYER
def test_streams_are_float32_where_the_model_is_narrower(changes: dict[str, Any]) -> None:
    model, (tokens, attention) = classifier(**changes, residual="reversible").bfloat16().train(), batch()
    output = copy.deepcopy(model).model(tokens, attention_mask=attention)
    assert output.pooler_output.dtype == torch.bfloat16
    reversed_ = copy.deepcopy(model)  # a training call may change buffers
    reversed_(tokens, attention_mask=attention, labels=LABELS).loss.backward()
    narrow = {
        name: parameter.grad.float() for name, parameter in reversed_.named_parameters() if parameter.grad is not None
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reversible, "couple_reversibly", reversible.couple)
        model(tokens, attention_mask=attention, labels=LABELS).loss.backward()
    largest = max(float(gradient.norm()) for gradient in narrow.values())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert float((narrow[name] - parameter.grad.float()).norm()) <= 0.02 * largest, name


def test_autocast_is_as_it_was_in_the_recompute() -> None:
    model, (tokens, attention) = two_streams(dropout=0.2).float(), batch()
    gradients = []
    for couple in (reversible.couple_reversibly, reversible.couple):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reversible, "couple_reversibly", couple)
            model.zero_grad()
            torch.manual_seed(1)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(tokens, attention_mask=attention, labels=LABELS).loss
            loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    largest = max(float(gradient.norm()) for gradient in gradients[1].values() if gradient is not None)
    for name, expected in gradients[1].items():
        found = gradients[0][name]
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert float((found - expected).norm()) <= 0.01 * largest


def test_receipts_are_left_once(restless: dict[str, Any]) -> None:
    model = two_streams(**restless)
    with receipts() as collected:
        loss_of(model).backward()
    assert [receipt.count for receipt in collected.entries] == [3]


def test_the_trainer_trains_it_as_the_definition(tmp_path: Path) -> None:
    tokens, attention = batch()
    rows = [
        {"input_ids": ids, "attention_mask": kept, "labels": label}
        for ids, kept, label in zip(tokens, attention, LABELS, strict=True)
    ]
    weights = []
    for couple in (reversible.couple_reversibly, reversible.couple):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        model = two_streams(dropout=0.2)
        start = model.head.classify.weight.detach().clone()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reversible, "couple_reversibly", couple)
            Trainer(model=model, args=arguments, train_dataset=rows).train()  # pyright: ignore[reportArgumentType] - a list is a dataset
        assert not torch.equal(model.head.classify.weight, start)
        weights.append(model.state_dict())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, place in PLACEMENTS.items() if place == "block"])
def test_a_mixer_that_owns_its_residual_is_refused_when_the_model_is_built(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: owns its residual, so residual='reversible' .* or one of .*full"):
        classifier(
            mixer=["full", small(name)],
            feedforward=["mlp", None],
            residual="reversible",
            causal=not traits(name).bidirectional,
            pooling="mean",
        )


def test_a_norm_behind_the_sum_is_refused() -> None:
    with pytest.raises(ValueError, match="residual='reversible' needs norm='pre'"):
        classifier(residual="reversible", norm="post")


def test_a_state_is_refused_in_training() -> None:
    model, (tokens, _) = two_streams(), batch()
    with pytest.raises(ValueError, match="residual='reversible' can't train with a state"):
        model.model(tokens, past_key_values=SubquadCache())


def test_the_stream_between_layers_is_refused_where_gradients_are_computed() -> None:
    model, (tokens, _) = two_streams(), batch()
    with pytest.raises(ValueError, match=r"output_hidden_states=True keeps the stream .*under torch\.no_grad\(\)"):
        model(tokens, output_hidden_states=True)


def test_activation_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        two_streams().activation_checkpointing_enable()


def test_a_backward_pass_after_an_update_is_refused() -> None:
    model = two_streams()
    loss = loss_of(model)
    with torch.no_grad():
        blocks_of(model.model)[0].mixer.get_parameter("project_out.weight").add_(1.0)
    with pytest.raises(RuntimeError, match="call backward before the parameters are updated or exchanged"):
        loss.backward()
