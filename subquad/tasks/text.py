"""Text classification: which class a text belongs to, from its bytes.

    tokens   G o o d   f u n .        ids are bytes: 71 111 111 100 32 102 117 110 46
    label    1                        classes are numbered by name: negative 0, positive 1

All texts are the user's own (`--data PATH`: layouts in `labelled_texts`, splits by name as in `own_files`). Of a longer
one the first `max_length` bytes count, as in Long Range Arena; the title says how many are cut. Padding is id 256.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from subquad.byte_ids import PAD_TOKEN_ID, UNMASKED_VOCABULARY
from subquad.tasks.base import DataPreset, Progress, Task
from subquad.tasks.identity import identity
from subquad.tasks.kinds import ClassificationData
from subquad.tasks.labelled_texts import LabelledText, read_labelled
from subquad.tasks.own_files import given_splits, name_rank
from subquad.tasks.splits import LabelledSplit, Ragged

_SHARE = 10
"""One text in so many is held out for each of validation and test."""

Texts = dict[str, list[LabelledText]]


class TextTask(Task):
    """The class of a text; see the module."""

    name: ClassVar[str] = "text"
    has_examples: ClassVar[bool] = False

    def prepare(
        self, directory: Path, preset: DataPreset, *, seed: int = 0, workers: int = 1, progress: Progress | None = None
    ) -> ClassificationData:
        """Refused: the texts are the user's.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "task 'text' has no texts of its own: name yours with --data PATH, a folder with a folder for each class, "
            "or a .csv, .tsv or .parquet file with columns called text and label"
        )

    def read(self, path: Path, preset: DataPreset) -> ClassificationData:
        """As in `Task`: folders of classes, or tables."""
        texts = _read_splits(path)
        lengths = [len(text.text) for part in texts.values() for text in part]
        cut = sum(length > preset.max_length for length in lengths)
        note = f" ({cut:,} of {len(lengths):,} cut to {preset.max_length:,} bytes)" if cut else ""
        return self._gathered(preset, texts, f"Texts of {path.name}{note}")

    def _gathered(self, preset: DataPreset, texts: Texts, title: str) -> ClassificationData:
        classes = sorted({text.label for part in texts.values() for text in part})
        if len(classes) < 2:
            raise ValueError(f"{title}: expected at least two classes, got {', '.join(classes)}")
        number = {label: index for index, label in enumerate(classes)}
        splits = {split: _split(part, number, preset.max_length) for split, part in texts.items()}
        return ClassificationData(
            **identity(self.name, preset, splits, title=title),
            vocab_size=UNMASKED_VOCABULARY,
            byte_ids=True,
            pad_token_id=PAD_TOKEN_ID,
            num_labels=len(classes),
            max_length=preset.max_length,
            metric="accuracy",
        )


def _split(texts: list[LabelledText], number: dict[str, int], length: int) -> LabelledSplit:
    cut = [text.text[:length] for text in texts]
    values = np.frombuffer(b"".join(cut), dtype=np.uint8)
    inputs = Ragged.from_lengths(values, np.array([len(text) for text in cut], dtype=np.int64))
    return LabelledSplit(inputs, np.array([number[text.label] for text in texts], dtype=np.int64))


def _read_splits(path: Path) -> Texts:
    """Splits as the names say, or else a tenth of the texts held out for each of validation and test."""
    given = given_splits(path) if path.is_dir() else None
    if given is None:
        return _divide(read_labelled(path))
    texts = {split: [text for part in parts for text in read_labelled(part)] for split, parts in given.items()}
    if "validation" not in texts:
        texts["validation"], texts["train"] = _hold_out(texts["train"])
    return {split: texts[split] for split in ("train", "validation", "test")}


def _divide(texts: list[LabelledText]) -> Texts:
    test, rest = _hold_out(texts)
    validation, train = _hold_out(rest)
    return {"train": train, "validation": validation, "test": test}


def _hold_out(texts: list[LabelledText]) -> tuple[list[LabelledText], list[LabelledText]]:
    """A tenth of every class, at least one, chosen by the names alone; and the rest.

    Raises:
        ValueError: if a class has too few texts.
    """
    held: set[str] = set()
    for label in sorted({text.label for text in texts}):
        names = sorted((text.name for text in texts if text.label == label), key=name_rank)
        if len(names) < 2:
            raise ValueError(
                f"class {label!r} has {len(names)} text left to be split: expected at least three in each class, or "
                "splits called train and test"
            )
        held.update(names[: max(1, len(names) // _SHARE)])
    return [text for text in texts if text.name in held], [text for text in texts if text.name not in held]
