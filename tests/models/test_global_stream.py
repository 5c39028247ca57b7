"""Mixers with a global stream: the model prepends learned vectors, and nothing else changes its meaning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import batch, blocks_of, causal_lm, classifier, config

from subquad import receipts
from subquad.interface import MixerConfig
from subquad.mechanisms.full import FullConfig
from subquad.models import SubquadForSequenceClassification
from subquad.registry import register

STREAMS: dict[str, Any] = {"name": "bigbird", "kind": "etc", "num_global": 3, "window": 5, "max_distance": 2}
POOLINGS = pytest.mark.parametrize("pooling", ["cls", "first", "mean", "last"])


@POOLINGS
def test_the_stream_stands_in_front_and_is_left_out_of_the_hidden_states(pooling: str) -> None:
    model, (tokens, attention) = classifier(mixer=STREAMS, pooling=pooling), batch()
    output = model.model(tokens, attention_mask=attention, output_hidden_states=True)
    assert output.last_hidden_state.shape == (3, 13, 16)
    assert not output.last_hidden_state[attention == 0].any()
    before, after = output.hidden_states[0], output.hidden_states[-1]
    prepended = 4 if pooling == "cls" else 3
    assert before.shape == after.shape == (3, 13 + prepended, 16)
    assert model.model.embedding.stream is not None
    assert torch.equal(before[:, :3], model.model.embedding.stream.expand(3, -1, -1))
    assert torch.equal(after[:, prepended:], output.last_hidden_state)
    expected = {
        "cls": after[:, 3],
        "first": output.last_hidden_state[:, 0],
        "mean": output.last_hidden_state.sum(dim=1) / attention.sum(dim=1, keepdim=True),
        "last": output.last_hidden_state[torch.arange(3), attention.sum(dim=1) - 1],
    }
    torch.testing.assert_close(output.pooler_output, expected[pooling])


@POOLINGS
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_no_logit(pooling: str, side: str) -> None:
    model, (tokens, attention) = classifier(mixer=STREAMS, pooling=pooling).double(), batch()
    if side == "left":
        tokens, attention = tokens.flip(1), attention.flip(1)
    logits = model(tokens, attention_mask=attention).logits
    assert torch.equal(model(torch.where(attention == 1, tokens, 5), attention_mask=attention).logits, logits)
    if side == "left":
        return  # distances are counted in the padded sequence
    for row, kept in enumerate(attention.bool()):
        torch.testing.assert_close(model(tokens[row : row + 1, kept]).logits[0], logits[row], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_the_stream_takes_no_position(positions: str) -> None:
    model, plain = (classifier(mixer=mixer, positions=positions).model for mixer in (STREAMS, "full"))
    plain.embedding.load_state_dict({n: p for n, p in model.embedding.state_dict().items() if n != "stream"})
    tokens, _ = batch()
    first, of_plain = (each(tokens, output_hidden_states=True).hidden_states[0] for each in (model, plain))
    assert torch.equal(first[:, 3:], of_plain)


def test_everything_a_token_is_told_passes_through_the_stream() -> None:
    model, (tokens, _) = classifier(mixer=STREAMS, num_hidden_layers=2, pooling="last").double(), batch(rows=1)
    vectors = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=vectors).logits.sum().backward()
    assert vectors.grad is not None
    assert bool((vectors.grad.abs().amax(dim=-1) > 0).all())  # two windows alone reach 4 of 12 tokens back


def test_the_longest_input_has_room_for_the_stream() -> None:
    model = classifier(mixer=STREAMS, positions="learned")
    assert blocks_of(model.model)[0].mixer.dims.max_length == 40 + 3 + 1
    model(torch.ones(1, 40, dtype=torch.int64))
    with pytest.raises(ValueError, match="max_position_embeddings=40; raise it"):
        model(torch.ones(1, 41, dtype=torch.int64))


def test_the_price_includes_the_stream() -> None:
    model = classifier(mixer=STREAMS)
    dims = model.config.mixer_dims(0, prepended=4)
    written = MixerConfig.from_dict(STREAMS)
    assert model.model.cost(20).flops == 3 * (written.cost(dims, 24, 4).flops + 4 * 24 * 16 * 24)


def test_a_loaded_model_gives_the_same_logits(tmp_path: Path) -> None:
    model, (tokens, attention) = classifier(mixer=STREAMS), batch()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = SubquadForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens, attention).logits, model(tokens, attention).logits)


def test_a_fresh_stream_is_random_and_learns() -> None:
    torch.manual_seed(0)
    model = SubquadForSequenceClassification(config(mixer=STREAMS, hidden_size=64))
    stream = model.model.embedding.stream
    assert stream is not None
    assert float(stream.detach().std()) == pytest.approx(1.0, abs=0.2)
    tokens, attention = batch()
    model(tokens, attention, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert stream.grad is not None
    assert bool((stream.grad.abs().amax(dim=1) > 0).all())


def test_global_tokens_of_the_input_are_asked_for_behind_the_stream() -> None:
    model, (tokens, attention) = classifier(mixer=STREAMS, global_tokens="first"), batch()
    with receipts() as collected:
        output = model(tokens, attention_mask=attention)
    assert output.logits.shape == (3, 3)
    asked = [receipt for receipt in collected.entries if receipt.asked == "global_tokens"]
    assert [receipt.count for receipt in asked] == [3]


@pytest.mark.parametrize(
    ("mixer", "found"),
    [
        ([STREAMS, "full"], "full 0, bigbird 3"),
        ([STREAMS, STREAMS | {"num_global": 5}], "bigbird 3, bigbird 5"),
    ],
)
def test_layers_must_agree_on_the_stream(mixer: Any, found: str) -> None:
    with pytest.raises(ValueError, match=rf"mixers must agree on its tokens \(num_global\); got {found}"):
        classifier(mixer=mixer)


def test_layers_that_agree_may_differ_otherwise() -> None:
    model, (tokens, _) = classifier(mixer=[STREAMS, STREAMS | {"window": 9, "sharing": "qkv"}]), batch()
    assert model(tokens).logits.shape == (3, 3)


@dataclass(frozen=True, kw_only=True)
class StreamedConfig(FullConfig):
    """Dense attention that asks for a global stream, although it has a causal form."""

    @property
    def prepended_tokens(self) -> int:
        return 2


def test_a_stream_that_sees_everything_is_refused_where_a_token_may_see_the_past_only() -> None:
    register("streamed")(StreamedConfig)
    assert classifier(mixer="streamed").model.global_stream == 2
    with pytest.raises(ValueError, match=r"streamed: its global stream .* sees all of it, which causal=True forbids"):
        causal_lm(mixer="streamed")


def test_without_such_mixers_there_is_no_stream() -> None:
    model = classifier(mixer="bigbird")
    assert model.config.global_stream() == 0
    assert model.model.embedding.stream is None
