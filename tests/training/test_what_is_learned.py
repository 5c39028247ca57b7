"""What the tasks are for: models learn what their mechanism can do, and stay ignorant of what it can't."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_data import trainer_of

from subquad.benchmark.plan import read_data
from subquad.training.presets import load_preset

pytestmark = pytest.mark.slow

SHORT_SEQUENCES = {"symbols": 8, "shortest": 4, "longest": 8}


def share_right(
    task: str, mixer: str, folder: Path, *, steps: int, max_length: int, generator: dict[str, Any]
) -> float:
    """Test accuracy after a training with the settings of the quick preset, on smaller examples."""
    preset = load_preset(task, "quick")
    sizes = {"train": 20_000, "validation": 100, "test": 200, "max_length": max_length, "generator": generator}
    training = replace(preset.training, steps=steps, evaluate_every=steps // 4, warmup_steps=50)
    preset = replace(preset, data=replace(preset.data, **sizes), training=training)
    data = read_data(preset, folder, generated=True)
    _, _, test = trainer_of(data, preset, folder, mixer=mixer).fit().best_validation
    return test.estimate.value


@pytest.mark.parametrize("mixer", ["full", "ngram:n=4"])
@pytest.mark.parametrize("task", ["copy", "reverse"])
def test_an_encoder_decoder_learns_to_copy_and_to_reverse(task: str, mixer: str, tmp_path: Path) -> None:
    assert share_right(task, mixer, tmp_path, steps=400, max_length=9, generator=SHORT_SEQUENCES) > 0.99


def test_recall_separates_dense_attention_from_linear_attention(tmp_path: Path) -> None:
    right = {
        mixer: share_right(
            "mqar", mixer, tmp_path / mixer, steps=1000, max_length=32, generator={"vocabulary": 64, "pairs": 6}
        )
        for mixer in ("full", "linear")
    }
    assert right["full"] > 0.95
    assert right["linear"] < 0.5
