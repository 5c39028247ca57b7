"""Masked text: bytes that are hidden, from those on both sides.

    text     T h e   c a t
    tokens   T _ e   c a _        "_" is the mask, id 257
    asked      h           t

The text is that of `text-lm`: the user's own, or the standard library of the Python that runs. Which bytes are masked,
`mask_share` of them, is drawn anew in every pass of training and never changes in evaluation. Padding is id 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from subquad.byte_ids import MASK_TOKEN_ID, MASKED_VOCABULARY, PAD_TOKEN_ID
from subquad.config import coerce_fields
from subquad.tasks.base import DataPreset, Progress, Task
from subquad.tasks.identity import identity
from subquad.tasks.kinds import MaskedData
from subquad.tasks.python_text import library_splits
from subquad.tasks.splits import LanguageSplit
from subquad.tasks.text_corpus import read_corpus


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """What is hidden.

    Attributes:
        mask_share: share of the bytes, between 0 and 1.

    Raises:
        ValueError: for a value of the wrong type or out of range.
    """

    mask_share: float = 0.15

    def __post_init__(self) -> None:
        coerce_fields(self, "generator")
        if not 0 < self.mask_share < 1:
            raise ValueError(f"generator: mask_share must be between 0 and 1, got {self.mask_share}")


class TextMlmTask(Task):
    """Masked bytes; see the module."""

    name: ClassVar[str] = "text-mlm"

    def prepare(
        self, directory: Path, preset: DataPreset, *, seed: int = 0, workers: int = 1, progress: Progress | None = None
    ) -> MaskedData:
        """As in `Task`: windows of the standard library; `directory`, `seed` and `workers` are of no consequence."""
        splits, title = library_splits(preset)
        return self._gathered(preset, splits, title)

    def read(self, path: Path, preset: DataPreset) -> MaskedData:
        """As in `Task`: windows of a file or of the files of a folder."""
        return self._gathered(preset, read_corpus(path, preset), f"Text of {path.name}")

    def _gathered(self, preset: DataPreset, splits: dict[str, LanguageSplit], title: str) -> MaskedData:
        return MaskedData(
            **identity(self.name, preset, splits, title=f"{title}, masked"),
            vocab_size=MASKED_VOCABULARY,
            byte_ids=True,
            pad_token_id=PAD_TOKEN_ID,
            max_length=preset.max_length,
            metric="bits_per_byte",
            mask_token_id=MASK_TOKEN_ID,
            mask_share=preset.options(MaskOptions).mask_share,
        )
