"""Text for language models: windows of documents, splits, and what can't be read."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad.tasks.base import DataPreset
from subquad.tasks.registry import load_task
from subquad.tasks.splits import LanguageSplit
from subquad.tasks.text_corpus import read_corpus

TASKS = ("text-lm", "text-mlm")


def preset(*, max_length: int = 8, count: int = 5, **generator: Any) -> DataPreset:
    return DataPreset("toy", "toy", False, 50, count, count, max_length, generator)


def documents_of(split: LanguageSplit) -> list[bytes]:
    """The windows joined to what they were cut from."""
    joined: list[bytes] = []
    assert split.continues is not None
    for window, continues in zip(split.inputs, split.continues, strict=True):
        if continues:
            joined[-1] += window.tobytes()
        else:
            joined.append(window.tobytes())
    return joined


def write(folder: Path, texts: dict[str, bytes]) -> Path:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return folder


@given(sizes=st.lists(st.integers(0, 60), min_size=4, max_size=12), length=st.integers(2, 9))
def test_windows_lose_no_byte_and_never_hold_two_documents(
    sizes: list[int], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    texts = {f"{index:02}.txt": bytes([index + 1]) * size for index, size in enumerate([*sizes, 40, 40, 40])}
    folder = write(tmp_path_factory.mktemp("texts"), texts)
    splits = read_corpus(folder, preset(max_length=length, count=1000))
    found = sorted(text for split in splits.values() for text in documents_of(split))
    expected = [text[: len(text) - (len(text) % length == 1)] for text in texts.values()]
    assert found == sorted(text for text in expected if text)
    assert all(split.lengths.max() <= length and split.lengths.min() >= 2 for split in splits.values())
    assert all(len(set(window.tolist())) == 1 for split in splits.values() for window in split.inputs)


def test_a_lone_file_gives_its_end_to_validation_and_test(tmp_path: Path) -> None:
    text = bytes(np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8))
    path = tmp_path / "book.txt"
    path.write_bytes(text)
    splits = read_corpus(path, preset(max_length=10, count=5))
    assert (
        b"".join(documents_of(splits["train"]) + documents_of(splits["validation"]) + documents_of(splits["test"]))
        == text
    )
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [90, 5, 5]
    assert isinstance(splits["train"].inputs.values.base, np.memmap)


def test_given_splits_are_taken_whole(tmp_path: Path) -> None:
    write(tmp_path, {"wiki.train.txt": b"a" * 300, "wiki.valid.txt": b"b" * 16, "wiki.test.txt": b"c" * 24})
    splits = read_corpus(tmp_path, preset())
    assert {name: documents_of(split) for name, split in splits.items()} == {
        "train": [b"a" * 300],
        "validation": [b"b" * 16],
        "test": [b"c" * 24],
    }


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"a" * 100, ".hidden": b"h" * 100})
    assert all(b"h" not in text for split in read_corpus(tmp_path, preset()).values() for text in documents_of(split))


@pytest.mark.parametrize("task", TASKS)
def test_the_embedded_text_is_what_this_python_carries(task: str) -> None:
    data = load_task(task).prepare(Path("unused"), preset(max_length=256, count=10))
    assert data.data_hash == load_task(task).prepare(Path("elsewhere"), preset(max_length=256, count=10)).data_hash
    assert b"import" in data.train.inputs.values.tobytes()
    assert data.title.startswith("Sources of Python 3.")
    assert (data.metric, data.pad_token_id) == ("bits_per_byte", 256)
    assert 3 < data.guess().test < 8


def test_masked_text_says_how_much_is_masked(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"x" * 500)
    data = load_task("text-mlm").read(path, preset(mask_share=0.3))
    assert data.facts() == {"mask_token_id": 257, "mask_share": 0.3}
    assert data.vocab_size == 258
    with pytest.raises(ValueError, match=r"mask_share must be between 0 and 1, got 1.5"):
        load_task("text-mlm").read(path, preset(mask_share=1.5))


@pytest.mark.parametrize("task", TASKS)
def test_text_that_can_not_be_read_is_named(task: str, tmp_path: Path) -> None:
    def read(path: Path) -> None:
        load_task(task).read(path, preset())

    with pytest.raises(ValueError, match="nowhere: there is no such file or folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no files: expected at least one"):
        read(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"book.txt.gz is compressed, its bytes are no text: unpack it first"):
        read(write(tmp_path, {"book.txt.gz": b"x" * 100}) / "book.txt.gz")
    with pytest.raises(ValueError, match=r"short.txt holds 20 bytes of text to be split, .* hence 24 bytes"):
        read(write(tmp_path, {"short.txt": b"x" * 20}) / "short.txt")
    write(tmp_path / "halves", {"train.txt": b"x" * 100, "valid.txt": b"x" * 100})
    with pytest.raises(ValueError, match=r"holds train.txt and valid.txt, but nothing for test: add one, called test"):
        read(tmp_path / "halves")


def test_the_copy_of_a_folder_lies_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, chosen = write(tmp_path / "texts", {f"{index}.txt": bytes(40) for index in range(9)}), []
    plain = tempfile.TemporaryFile

    def seen(**named: Any) -> Any:
        chosen.append(named["dir"])
        return plain(**named)

    monkeypatch.setattr(tempfile, "TemporaryFile", seen)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    read_corpus(folder, preset())
    assert set(chosen) == {str(tmp_path)}
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"cannot keep 2\d\d bytes of text in .*nowhere: No such file or directory"):
        read_corpus(folder, preset())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to stand for a full disk")
def test_a_full_disk_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "texts", {f"{index}.txt": bytes(40) for index in range(9)})
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("wb"))  # noqa: SIM115 - the reader closes it
    with pytest.raises(ValueError, match=r"No space left on device; free some space, or name a folder .* TMPDIR"):
        read_corpus(folder, preset())
