"""Text: the next byte from the bytes before it.

    tokens   T h e   c a t        ids are bytes: 84 104 101 32 99 97 116
    asked      h e   c a t        the first byte of a window is not asked for

The text is the user's own (`--data PATH`: a file, or a folder of files, of any size; see `text_corpus` for documents,
windows and splits), or else the standard library of the Python that runs (see `python_text`). The score is bits per
byte; by position in the context it tells how far back a mechanism makes use of. Padding is id 256.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from subquad.byte_ids import PAD_TOKEN_ID, UNMASKED_VOCABULARY
from subquad.tasks.base import DataPreset, Progress, Task
from subquad.tasks.identity import identity
from subquad.tasks.kinds import CausalData
from subquad.tasks.python_text import library_splits
from subquad.tasks.splits import LanguageSplit
from subquad.tasks.text_corpus import read_corpus


class TextLmTask(Task):
    """The next byte; see the module."""

    name: ClassVar[str] = "text-lm"

    def prepare(
        self, directory: Path, preset: DataPreset, *, seed: int = 0, workers: int = 1, progress: Progress | None = None
    ) -> CausalData:
        """As in `Task`: windows of the standard library; `directory`, `seed` and `workers` are of no consequence."""
        splits, title = library_splits(preset)
        return self._gathered(preset, splits, title)

    def read(self, path: Path, preset: DataPreset) -> CausalData:
        """As in `Task`: windows of a file or of the files of a folder."""
        return self._gathered(preset, read_corpus(path, preset), f"Text of {path.name}")

    def _gathered(self, preset: DataPreset, splits: dict[str, LanguageSplit], title: str) -> CausalData:
        return CausalData(
            **identity(self.name, preset, splits, title=title),
            vocab_size=UNMASKED_VOCABULARY,
            byte_ids=True,
            pad_token_id=PAD_TOKEN_ID,
            max_length=preset.max_length,
            metric="bits_per_byte",
        )
