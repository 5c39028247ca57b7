"""Images in IDX files, the format of MNIST and what followed it, plain or compressed by gzip.

bytes 0-1  zero       byte 2  0x08 for unsigned bytes       byte 3  number of sizes, here 3
then the sizes (images, rows, columns), big-endian, 4 bytes each; then the pixels
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

FILE_NAMES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
"""As MNIST and Fashion-MNIST call them, with or without ".gz"."""
_MAGIC = b"\x00\x00\x08\x03"
_HEADER_BYTES = 16


def read_idx_folder(folder: Path) -> dict[str, np.ndarray]:
    """The images of train and test, uint8 (n, rows, columns) each, of one size.

    Raises:
        ValueError: if a file is missing or damaged, or the two hold images of different sizes.
    """
    found = {split: read_idx(_find(folder, name)) for split, name in FILE_NAMES.items()}
    sizes = {split: images.shape[1:] for split, images in found.items()}
    if sizes["train"] != sizes["test"]:
        raise ValueError(f"{folder}: images for training are {sizes['train']} but those for test {sizes['test']}")
    return found


def read_idx(path: Path) -> np.ndarray:
    """The images of one file, uint8 (n, rows, columns).

    Raises:
        ValueError: if it can't be read, or its header or size is not that of images.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if content[:4] != _MAGIC or len(content) < _HEADER_BYTES:
        raise ValueError(
            f"{path}: expected the header of IDX images, {_MAGIC.hex()}, got {content[:4].hex() or 'nothing'}"
        )
    sizes = tuple(int(size) for size in np.frombuffer(content, ">u4", 3, 4))
    if len(content) - _HEADER_BYTES != math.prod(sizes) or not math.prod(sizes):
        raise ValueError(
            f"{path}: the header promises {sizes[0]} images of {sizes[1]} x {sizes[2]} pixels, hence "
            f"{math.prod(sizes)} bytes, but {len(content) - _HEADER_BYTES} follow it: the file is damaged"
        )
    return np.frombuffer(content, np.uint8, offset=_HEADER_BYTES).reshape(sizes)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    expected = ", ".join(FILE_NAMES.values())
    raise ValueError(f"{folder} lacks {name}, also with .gz: expected {expected}, as of MNIST, side by side")
