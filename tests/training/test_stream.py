"""Memory goes from window to window as if the document had been read in one go, and survives an interruption."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_data import toy, trainer_of

from subquad.benchmark.mixers import parse_mixer
from subquad.training.checkpoint import STREAM_FILE, DamagedCheckpointError, checkpoint_path
from subquad.training.objectives.registry import objective_of
from subquad.training.presets import Preset, preset_from_tables
from subquad.training.stream import StreamMemory, memory_of

CARRYING = ("local:window=5", "linear", "transformer_xl:memory_length=6", "ngram", "retention")


def model_of(mixer: str, tiny: Preset) -> Any:
    objective, config = objective_of(toy("stream"), seed=0), parse_mixer(mixer).config
    torch.manual_seed(0)
    return objective.build(objective.model_settings(tiny.model_dict(), config), config).eval()


def carried(memory: StreamMemory, model: Any, tokens: torch.Tensor, rows: list[bool]) -> torch.Tensor:
    output = model(tokens, past_key_values=memory.before(torch.tensor(rows)), use_cache=True)
    memory.after(output.past_key_values)
    return output.logits


@pytest.mark.parametrize("mixer", CARRYING)
def test_two_windows_are_one_document_and_a_new_document_starts_with_nothing(mixer: str, tiny: Preset) -> None:
    model = model_of(mixer, tiny)
    memory = memory_of(model)
    assert memory is not None
    tokens = torch.randint(0, 6, (2, 15), generator=torch.Generator().manual_seed(1))
    first, second, third = tokens.split(5, dim=1)
    carried(memory, model, first, [False, False])
    logits = carried(memory, model, second, [True, False])
    torch.testing.assert_close(logits[0], model(tokens[:1, :10]).logits[0, 5:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1], model(second[1:]).logits[0], rtol=1e-4, atol=1e-5)
    logits = carried(memory, model, third, [True, True])
    torch.testing.assert_close(logits[1], model(tokens[1:, 5:]).logits[0, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", ["full", "linformer", "aft", "combiner"])
def test_what_has_no_state_of_constant_size_carries_none(mixer: str, tiny: Preset) -> None:
    if mixer != "linformer":
        assert memory_of(model_of(mixer, tiny)) is None
    assert memory_of(torch.nn.Linear(1, 1)) is None


def test_gradients_stop_between_windows(tiny: Preset) -> None:
    model = model_of("linear", tiny)
    memory = StreamMemory(model)
    carried(memory, model, torch.zeros(1, 4, dtype=torch.int64), [False])
    assert not any(tensor.requires_grad for tensor in memory.tensors().values())
    assert not memory.before(torch.tensor([True])).states[0].own.length.requires_grad


def test_a_memory_survives_the_way_to_tensors_and_back(tiny: Preset) -> None:
    model = model_of("local:window=5", tiny)
    memory, again = StreamMemory(model), StreamMemory(model)
    tokens = torch.randint(0, 6, (2, 5))
    carried(memory, model, tokens, [False, False])
    again.restore(memory.tensors())
    assert torch.equal(carried(memory, model, tokens, [True, False]), carried(again, model, tokens, [True, False]))


class StoppedError(Exception):
    pass


def stop(step: int, steps: int, validation: float | None) -> None:
    if step == 13:
        raise StoppedError


@pytest.mark.parametrize(("mixer", "carries"), [("local:window=5", True), ("transformer_xl", True), ("full", False)])
def test_a_stream_that_was_interrupted_continues_bit_for_bit(
    mixer: str, carries: bool, tiny: Preset, tmp_path: Path
) -> None:
    data, options = toy("stream"), {"mixer": mixer, "stream": True, "batch_size": 4}
    whole = trainer_of(data, tiny, tmp_path / "whole", **options).fit()
    with pytest.raises(StoppedError):
        trainer_of(data, tiny, tmp_path / "parts", progress=stop, **options).fit()
    assert (checkpoint_path(tmp_path / "parts", 8) / STREAM_FILE).exists() is carries
    parts = trainer_of(data, tiny, tmp_path / "parts", **options).fit()
    assert replace(parts, seconds=0.0) == replace(whole, seconds=0.0)
    assert whole.carries_state is carries
    last = [load_file(checkpoint_path(tmp_path / run, 24) / "model.safetensors") for run in ("whole", "parts")]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_a_forgotten_memory_would_be_noticed(tiny: Preset, tmp_path: Path) -> None:
    data, options = toy("stream"), {"mixer": "local:window=5", "stream": True, "batch_size": 4}
    whole = trainer_of(data, tiny, tmp_path / "whole", **options).fit()
    with pytest.raises(StoppedError):
        trainer_of(data, tiny, tmp_path / "parts", progress=stop, **options).fit()
    (checkpoint_path(tmp_path / "parts", 8) / STREAM_FILE).unlink()
    with pytest.raises(DamagedCheckpointError, match=r"stream\.safetensors: the checkpoint is damaged"):
        trainer_of(data, tiny, tmp_path / "parts", **options).fit()
    alone = trainer_of(data, tiny, tmp_path / "alone", mixer="local:window=5", batch_size=4).fit()
    assert alone.last_step != whole.last_step


def test_evaluation_leaves_the_memory_of_training_alone(tiny: Preset, tmp_path: Path) -> None:
    trainer = trainer_of(toy("stream"), tiny, tmp_path, mixer="linear", stream=True, batch_size=4)
    memory = trainer._memory
    assert memory is not None
    batch = {**trainer.first_batch(), "before": torch.zeros(4, dtype=torch.int64)}
    assert trainer.model is not None
    trainer.compute_loss(trainer.model, batch)
    before = memory.tensors()
    trainer.evaluate()
    assert trainer._memory is memory
    assert all(torch.equal(before[name], tensor) for name, tensor in memory.tensors().items())


def test_every_window_of_a_split_is_scored_once(tiny: Preset, tmp_path: Path) -> None:
    trainer = trainer_of(toy("stream"), tiny, tmp_path, mixer="linear", stream=True, batch_size=6)
    assert trainer._test().asked == toy("stream").guess().asked


@pytest.mark.parametrize("mixer", ["linear", "full"])
def test_positions_count_through_the_windows_of_a_document(mixer: str, tiny: Preset, tmp_path: Path) -> None:
    """Documents of seven windows, the last one shorter, so of 53 tokens each; a batch of one row reads all of them."""
    data = toy("stream")
    trainer = trainer_of(data, tiny, tmp_path, mixer=mixer, stream=True, batch_size=1)
    found = trainer._test()
    bounds = [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 52)]
    assert [(bucket.first, bucket.last) for bucket in found.by_position] == bounds
    starts, asked = np.cumsum(data.test.lengths) - data.test.lengths, dict.fromkeys(bounds, 0)
    document = 0
    for window, (start, length) in enumerate(zip(starts, data.test.lengths, strict=True)):
        document = document if data.test.continues[window] else start
        for position in range(start - document + 1, start - document + length):  # the first token is not asked for
            asked[next(bound for bound in bounds if bound[0] <= position <= bound[1])] += 1
    assert [bucket.asked for bucket in found.by_position] == list(asked.values())
    assert sum(bucket.value * bucket.asked for bucket in found.by_position) == pytest.approx(
        found.estimate.value * found.asked
    )
    alone = trainer_of(data, tiny, tmp_path / "alone", mixer=mixer, batch_size=1)._test()
    assert [(bucket.first, bucket.last) for bucket in alone.by_position] == [(1, 1), (2, 3), (4, 7)]


def test_data_that_are_no_stream_are_refused(tiny: Preset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[training\]: stream = true needs data whose examples are consecutive"):
        trainer_of(toy("causal"), tiny, tmp_path, stream=True)


def test_positions_from_a_table_are_refused(tiny: Preset) -> None:
    tables = {
        "data": {name: getattr(tiny.data, name) for name in ("title", "is_lra", "train", "validation", "test")},
        "model": {**tiny.model_dict(), "positions": "learned"},
        "training": {**vars(tiny.training), "stream": True},
        "profile": {"lengths": [16]},
    }
    tables["data"] |= {"max_length": 24, "generator": dict(tiny.data.generator)}
    with pytest.raises(ValueError, match="stream = true goes beyond any table of positions, got positions = 'learned'"):
        preset_from_tables("listops", "mine", tables)
