"""Images as sequences of pixels: scikit-learn's digits, and IDX files."""

from __future__ import annotations

import gzip
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from subquad.tasks.base import DataPreset
from subquad.tasks.idx_images import FILE_NAMES, read_idx
from subquad.tasks.registry import load_task


def preset(*, train: int = 100, max_length: int = 65) -> DataPreset:
    return DataPreset("toy", "toy", False, train, 20, 30, max_length)


def idx(images: np.ndarray) -> bytes:
    return b"\x00\x00\x08\x03" + np.array(images.shape, ">u4").tobytes() + images.tobytes()


def write(folder: Path, *, zipped: bool = False) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(0).integers(0, 256, (60, 3, 4), dtype=np.uint8)
    images = {"train": drawn[:40], "test": drawn[40:]}
    for split, name in FILE_NAMES.items():
        content = idx(images[split])
        (folder / (f"{name}.gz" if zipped else name)).write_bytes(gzip.compress(content) if zipped else content)
    return images


def test_digits_are_rows_of_pixels_behind_a_token_that_begins_them() -> None:
    data = load_task("image-lm").prepare(Path("unused"), preset())
    digits = {tuple(image.ravel()) for image in load_digits(return_X_y=True)[0].astype(int)}
    for split in data.splits.values():
        assert all(tokens[0] == 17 and tuple(tokens[1:].tolist()) in digits for tokens in split.inputs)
    assert [len(split) for split in data.splits.values()] == [100, 20, 30]
    assert (data.vocab_size, data.pad_token_id, data.metric) == (19, 18, "bits_per_dimension")


def test_digits_without_their_package_name_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'subquad\[data\]', or name images of your own"):
        load_task("image-lm").prepare(Path("unused"), preset())


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_plain_and_compressed(zipped: bool, tmp_path: Path) -> None:
    images = write(tmp_path, zipped=zipped)
    data = load_task("image-lm").read(tmp_path, preset())
    assert [len(split) for split in data.splits.values()] == [36, 4, 20]
    assert data.max_length == 13
    for tokens, image in zip(data.test.inputs, images["test"], strict=True):
        assert tokens.tolist() == [256, *image.ravel().tolist()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x00\x08\x01", "expected the header of IDX images, 00000803, got 00000801"),
        (b"", "expected the header of IDX images, 00000803, got nothing"),
        (
            idx(np.zeros((2, 3, 4), np.uint8))[:-1],
            "promises 2 images of 3 x 4 pixels, hence 24 bytes, but 23 follow",
        ),
        (idx(np.zeros((0, 3, 4), np.uint8)), "the file is damaged"),
    ],
)
def test_a_damaged_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"images: .*{re.escape(message)}"):
        read_idx(path)


def test_a_file_that_is_no_gzip_is_named(tmp_path: Path) -> None:
    (tmp_path / "images.gz").write_bytes(b"plain")
    with pytest.raises(ValueError, match=r"images.gz: cannot be read"):
        read_idx(tmp_path / "images.gz")


def test_missing_files_long_images_and_too_few_digits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks train-images-idx3-ubyte, also with .gz"):
        load_task("image-lm").read(tmp_path, preset())
    write(tmp_path)
    with pytest.raises(ValueError, match=r"images have 12 pixels, .* they need max_length of 13, got 12"):
        load_task("image-lm").read(tmp_path, preset(max_length=12))
    with pytest.raises(ValueError, match="there are 1797 digits, got train, validation and test of 2050 together"):
        load_task("image-lm").prepare(tmp_path, preset(train=2000))
