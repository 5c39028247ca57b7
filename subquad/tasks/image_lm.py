"""Images: the next pixel from the pixels before it, row by row.

    image   0 9     tokens   16  0  9  4  7       16 begins an image
            4 7     asked        0  9  4  7

The images are handwritten digits of 8 x 8 pixels and 17 grey levels that come with scikit-learn, or IDX files
(`--data PATH`: a folder with MNIST's two files of images, such as Debian's dataset-fashion-mnist), with 256 levels. The
score is bits per dimension: of every pixel, none excepted. Ids: the levels, then the one that begins, then padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from subquad.tasks.base import DataPreset, Progress, Task
from subquad.tasks.identity import identity
from subquad.tasks.idx_images import read_idx_folder
from subquad.tasks.kinds import CausalData
from subquad.tasks.own_files import name_rank
from subquad.tasks.splits import LanguageSplit, Ragged

DIGIT_LEVELS, BYTE_LEVELS = 17, 256


class ImageLmTask(Task):
    """The next pixel; see the module."""

    name: ClassVar[str] = "image-lm"

    def prepare(
        self, directory: Path, preset: DataPreset, *, seed: int = 0, workers: int = 1, progress: Progress | None = None
    ) -> CausalData:
        """As in `Task`: scikit-learn's digits; `directory`, `seed` and `workers` are of no consequence."""
        images = _digits()
        order = sorted(range(len(images)), key=lambda index: name_rank(str(index)))
        if len(images) < sum(preset.counts.values()):
            raise ValueError(
                f"{preset.where}: there are {len(images)} digits, got train, validation and test of "
                f"{sum(preset.counts.values())} together; name other images with --data PATH, or use the preset quick"
            )
        splits, start = {}, 0
        for split, count in preset.counts.items():
            splits[split] = images[order[start : start + count]]
            start += count
        return self._gathered(preset, splits, DIGIT_LEVELS, preset.title)

    def read(self, path: Path, preset: DataPreset) -> CausalData:
        """As in `Task`; the last images for training, at most as many as the preset says, are for validation."""
        images = read_idx_folder(path)
        train, test = images["train"], images["test"]
        held = min(preset.validation, len(train) // 10)
        if not held:
            raise ValueError(f"{path}: expected at least 10 images for training, got {len(train)}")
        splits = {"train": train[:-held], "validation": train[-held:], "test": test[: preset.test]}
        return self._gathered(preset, splits, BYTE_LEVELS, f"Images of {path.name}")

    def _gathered(self, preset: DataPreset, images: dict[str, np.ndarray], levels: int, title: str) -> CausalData:
        pixels = images["train"][0].size
        if pixels + 1 > preset.max_length:
            raise ValueError(
                f"{preset.where}: images have {pixels} pixels, and with the one that begins they need max_length of "
                f"{pixels + 1}, got {preset.max_length}; use a preset with more"
            )
        splits = {split: _sequences(part, levels) for split, part in images.items()}
        return CausalData(
            **identity(self.name, preset, splits, title=title),
            vocab_size=levels + 2,
            pad_token_id=levels + 1,
            max_length=pixels + 1,
            metric="bits_per_dimension",
        )


def _sequences(images: np.ndarray, levels: int) -> LanguageSplit:
    """Images (n, rows, columns) as tokens, each behind the one that begins it."""
    count, pixels = len(images), images[0].size
    tokens = np.full((count, pixels + 1), levels, dtype=np.int32)
    tokens[:, 1:] = images.reshape(count, pixels)
    return LanguageSplit(Ragged.from_lengths(tokens.ravel(), np.full(count, pixels + 1)))


def _digits() -> np.ndarray:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "image-lm: the digits come with scikit-learn; install it with: pip install 'subquad[data]', or name images "
            "of your own with --data PATH"
        ) from error
    pixels, _ = load_digits(return_X_y=True)
    return np.asarray(pixels, dtype=np.uint8).reshape(-1, 8, 8)
