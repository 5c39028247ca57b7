"""Generation without end: the tokens of `generate`, constant memory, and snapshots to the bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import STATEFUL, batch, causal_lm, left_padded, small
from torch import Tensor

from subquad.build import list_mixers
from subquad.models import Sampling, StreamingGenerator, StreamSnapshot

CONSTANT = list_mixers(causal=True, constant_state=True)
ENDLESS = [name for name in CONSTANT if name not in list_mixers(fixed_length=True)]
BY_MIXER = pytest.mark.parametrize("name", CONSTANT)
SAMPLING = Sampling(temperature=1.5, top_k=8, top_p=0.9)


def take(stream: StreamingGenerator, count: int) -> Tensor:
    """The next tokens, (B, count)."""
    return torch.stack(list(itertools.islice(stream, count)), dim=1)


@BY_MIXER
@pytest.mark.parametrize("piece", [1, 5, 100])
def test_the_most_probable_tokens_are_those_of_generate(name: str, piece: int) -> None:
    model, (tokens, attention) = causal_lm(mixer=small(name)), left_padded()
    generating: Any = model
    expected = generating.generate(tokens, attention_mask=attention, do_sample=False, max_new_tokens=9)[:, 13:]
    assert torch.equal(take(StreamingGenerator(model, tokens, attention_mask=attention, piece=piece), 9), expected)


@BY_MIXER
@pytest.mark.parametrize("sampling", [None, SAMPLING], ids=["greedy", "sampling"])
def test_a_stream_goes_on_from_a_snapshot_in_a_file_to_the_bit(
    name: str, sampling: Sampling | None, tmp_path: Path
) -> None:
    model, (tokens, _) = causal_lm(mixer=small(name)), batch()
    stream = StreamingGenerator(model, tokens, sampling=sampling, seed=4)
    take(stream, 5)
    snapshot = stream.snapshot()
    save_file(snapshot.tensors(), tmp_path / "snapshot.safetensors")
    expected = take(stream, 12)
    read = StreamSnapshot.from_tensors(model, load_file(tmp_path / "snapshot.safetensors"))
    for moment in (snapshot, read):
        resumed = StreamingGenerator.resume(model, moment, sampling=sampling)
        assert torch.equal(take(resumed, 12), expected)
        assert resumed.snapshot().tensors().keys() == stream.snapshot().tensors().keys()
        torch.testing.assert_close(resumed.snapshot().tensors(), stream.snapshot().tensors(), rtol=0, atol=0)


def test_a_snapshot_before_anything_was_read_is_one_too() -> None:
    model = causal_lm(mixer="linear")
    stream = StreamingGenerator(model, torch.tensor([[3]]))
    snapshot = StreamSnapshot.from_tensors(model, stream.snapshot().tensors())
    assert torch.equal(take(StreamingGenerator.resume(model, snapshot), 4), take(stream, 4))


@pytest.mark.parametrize("name", ENDLESS)
def test_the_state_stops_growing(name: str) -> None:
    memories = {"memory_length": 8} if name == "transformer_xl" else {}
    model, (tokens, _) = causal_lm(mixer=small(name) | memories), batch(rows=2)
    stream = StreamingGenerator(model, tokens)
    take(stream, 10)
    after_some = stream.state_bytes
    take(stream, 60)  # beyond max_position_embeddings, which sinusoids don't know
    assert stream.state_bytes == after_some > 0


@pytest.mark.parametrize("seed", [0, 1])
def test_the_random_generator_is_the_streams_own(seed: int) -> None:
    model, (tokens, _) = causal_lm(mixer="linear"), batch()
    drawn = []
    for of_torch in (5, 6):
        torch.manual_seed(of_torch)
        before = torch.get_rng_state()
        drawn.append(take(StreamingGenerator(model, tokens, sampling=SAMPLING, seed=seed), 20))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], take(StreamingGenerator(model, tokens, sampling=SAMPLING, seed=seed + 1), 20))


@pytest.mark.parametrize("name", [name for name in list_mixers(causal=True) if name not in CONSTANT])
def test_a_mixer_whose_memory_grows_is_refused_by_name_and_reason(name: str) -> None:
    model = causal_lm(mixer=["linear", small(name)])
    reason = "its state grows with every token" if name in STATEFUL else "it has no state"
    with pytest.raises(ValueError, match=rf"can't stay constant with {name} \({reason}\); it does with aft, .*delta, "):
        StreamingGenerator(model, torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("positions", ["learned", "axial"])
def test_tables_of_positions_end_a_stream_with_the_reason(positions: str) -> None:
    stream = StreamingGenerator(causal_lm(mixer="linear", positions=positions), torch.ones(1, 30, dtype=torch.int64))
    take(stream, 11)
    with pytest.raises(ValueError, match=r"reaches 41 tokens, but .*max_position_embeddings=40; raise it"):
        next(stream)


def test_what_cannot_be_streamed_is_refused() -> None:
    model, (tokens, attention) = causal_lm(mixer="linear"), batch()
    with pytest.raises(ValueError, match="the prompt must end in real tokens; pad it on the left"):
        StreamingGenerator(model, tokens, attention_mask=attention)
    with pytest.raises(ValueError, match=r"attention_mask must have the prompt's shape .* = \(3, 13\), got \(3, 14\)"):
        StreamingGenerator(model, tokens, attention_mask=torch.ones(3, 14))
    with pytest.raises(ValueError, match="piece must be at least 1 token, got 0"):
        StreamingGenerator(model, tokens, piece=0)
    with pytest.raises(ValueError, match=r"prompt must have shape \(B, L\) with at least one token, got \(3, 0\)"):
        StreamingGenerator(model, tokens[:, :0])
    with pytest.raises(ValueError, match=r"prompt must lie in 0\.\.10"):
        StreamingGenerator(model, tokens + 8)
    with pytest.raises(ValueError, match=r"in training mode, where dropout acts; call model\.eval\(\)"):
        StreamingGenerator(model.train(), tokens)


def test_what_is_no_snapshot_of_this_model_is_refused() -> None:
    model, (tokens, _) = causal_lm(mixer="linear"), batch()
    tensors = StreamingGenerator(model, tokens).snapshot().tensors()
    with pytest.raises(ValueError, match="there is no tensor 'last'"):
        StreamSnapshot.from_tensors(model, {name: t for name, t in tensors.items() if name != "last"})
    with pytest.raises(ValueError, match="the states were written by another model"):
        StreamSnapshot.from_tensors(causal_lm(mixer="linear", num_hidden_layers=2), tensors)
