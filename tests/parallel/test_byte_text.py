"""Text as bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from subquad.byte_ids import MASK_TOKEN_ID
from subquad.labels import IGNORED
from subquad.parallel.byte_text import ByteText, masked, standard_library
from subquad.parallel.settings import Settings
from subquad.parallel.train import build_model
from subquad.tasks.base import DataPreset
from subquad.tasks.text_lm import TextLmTask


def text(tmp_path: Path, length: int = 5) -> ByteText:
    for name, content in (("one", bytes(range(200, 256))), ("two", b"\x00\x01")):
        (tmp_path / name).write_bytes(content)
    return ByteText([tmp_path / "one", tmp_path / "two"], length=length)


def test_examples_are_pieces_of_the_files_behind_one_another(tmp_path: Path) -> None:
    ids = text(tmp_path).examples(300, seed=1, step=2)
    assert ids.shape == (300, 5)
    assert torch.equal(ids[:, 1:], (ids[:, :-1] + 1) % 256)  # every byte is the one before plus 1
    assert {int(ids.min()), int(ids.max())} == {0, 255}


def test_ids_are_those_of_the_language_models_of_the_command_line(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.txt").write_bytes(bytes(range(256)))
    data = TextLmTask().read(tmp_path, DataPreset("toy", "toy", False, 5, 5, 5, max_length=256))
    (ids,) = ByteText([tmp_path / "train.txt"], length=256).examples(1, seed=0, step=0)
    assert ids.tolist() == data.train.inputs[0].tolist()
    config = build_model(Settings(layers=1)).config
    assert (config.vocab_size, config.pad_token_id) == (data.vocab_size, data.pad_token_id)
    assert config.byte_ids
    assert data.byte_ids


def test_a_step_has_its_own_examples_again_and_again(tmp_path: Path) -> None:
    read = text(tmp_path)
    assert torch.equal(read.examples(4, seed=1, step=2), read.examples(4, seed=1, step=2))
    others = [read.examples(4, seed=1, step=3), read.examples(4, seed=2, step=2)]
    assert not any(torch.equal(read.examples(4, seed=1, step=2), other) for other in others)


def test_hidden_bytes_are_the_labels_and_nothing_else_is() -> None:
    ids = torch.randint(256, (50, 40))
    hidden, labels = masked(ids, share=0.15, seed=1, step=0)
    assert torch.equal(hidden == MASK_TOKEN_ID, labels != IGNORED)
    assert torch.equal(torch.where(hidden == MASK_TOKEN_ID, labels, hidden), ids)
    assert 0.1 < float((labels != IGNORED).float().mean()) < 0.2


def test_every_example_has_a_hidden_byte() -> None:
    _, labels = masked(torch.ones(50, 3, dtype=torch.int64), share=1e-9, seed=1, step=0)
    assert (labels != IGNORED).sum(dim=1).tolist() == [1] * 50


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 files have 58 bytes of text, but an example has 59"):
        text(tmp_path, length=59)


def test_the_standard_library_is_there() -> None:
    assert len(ByteText(standard_library(), length=2).bytes) > 1_000_000
