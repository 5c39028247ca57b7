"""Running text as windows of bytes: from files to the splits of a language model.

A document is a file, or a part of one. It is cut into windows of `max_length` bytes, the last one shorter, and a window
never holds two documents. A byte left alone at the end asks nothing of a model and is dropped.

    document "abcdefgh", max_length 3      abc | def | gh        continues    no  yes  yes

Where no splits are given, test and then validation get a tenth of the text each, but no more windows than the preset
asks for, and train gets all the rest. Whole documents are held out, in an order that their names alone decide: those
that fit, or the smallest if none does. A lone document gives up its end: train comes first, then validation, then test.

Files are never held in memory: one that is read as a whole is mapped, several are copied into a temporary file that is
mapped and vanishes with its last array. It lies in the folder that the environment variable TMPDIR names, else in
/var/tmp, which is on disk where /tmp is in memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from subquad.tasks.base import DataPreset
from subquad.tasks.own_files import files_below, given_splits, name_rank
from subquad.tasks.splits import LanguageSplit, Ragged

_COPIED_AT_ONCE = 1 << 22
_LARGE_FILES = "/var/tmp"


@dataclass(frozen=True)
class Document:
    """Bytes `start` to `stop` of a file.

    Attributes:
        path: of the file.
        name: relative to the folder that the user named; decides the split.
        start: first byte.
        stop: after the last byte.
    """

    path: Path
    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.stop - self.start

    @classmethod
    def whole(cls, path: Path, name: str) -> Document:
        """A whole file.

        Raises:
            ValueError: if it can't be read.
        """
        try:
            return cls(path, name, 0, path.stat().st_size)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def read_corpus(path: Path, preset: DataPreset) -> dict[str, LanguageSplit]:
    """The splits of a file or of the files of a folder. Given splits are taken whole.

    Raises:
        ValueError: if there is nothing to read, something can't be read, or there is too little text.
    """
    given = given_splits(path) if path.is_dir() else None
    if given is None:
        return divide(path, documents_below([path]), preset)
    parts = {split: documents_below(paths) for split, paths in given.items()}
    limits = dict.fromkeys(parts)
    if "validation" not in parts:
        parts["train"], parts["validation"] = hold_out(path, parts["train"], preset, preset.validation)
        limits["validation"] = preset.validation
    return {
        split: windows(path, parts[split], preset.max_length, limits.get(split))
        for split in ("train", "validation", "test")
    }


def divide(path: Path, documents: list[Document], preset: DataPreset) -> dict[str, LanguageSplit]:
    """Hold out test and validation; train is all the rest. Errors call the text `path`. Raises as `hold_out`."""
    train, test = hold_out(path, documents, preset, preset.test)
    train, validation = hold_out(path, train, preset, preset.validation)
    return {
        "train": windows(path, train, preset.max_length, None),
        "validation": windows(path, validation, preset.max_length, preset.validation),
        "test": windows(path, test, preset.max_length, preset.test),
    }


def documents_below(paths: Sequence[Path]) -> list[Document]:
    """The files at or below these paths that aren't empty. Raises as `files_below` and `Document.whole`."""
    files = [(file, root) for root in paths for file in files_below(root)]
    documents = [Document.whole(file, file.relative_to(root.parent).as_posix()) for file, root in files]
    return [document for document in documents if document.size]


def hold_out(
    path: Path, documents: list[Document], preset: DataPreset, count: int
) -> tuple[list[Document], list[Document]]:
    """What is left, and a tenth of the text, or as much as fills `count` windows if that is less.

    Raises:
        ValueError: if there is too little text to hold out a window and keep two.
    """
    length, total = preset.max_length, sum(document.size for document in documents)
    wanted = max(min(total // 10, count * length), length)
    if total < 3 * length:
        raise ValueError(
            f"{path} holds {total} bytes of text to be split, and each split needs a window of {length}, hence "
            f"{3 * length} bytes: give more text, or use a preset with a smaller max_length"
        )
    if len(documents) == 1:
        cut = documents[0].stop - wanted
        return [replace(documents[0], stop=cut)], [replace(documents[0], start=cut)]
    held: list[Document] = []
    for document in sorted(documents, key=lambda document: name_rank(document.name)):
        if document.size <= wanted - sum(other.size for other in held):
            held.append(document)
    held = held or [min(documents, key=lambda document: (document.size, document.name))]
    return [document for document in documents if document not in held], [d for d in documents if d in held]


def windows(path: Path, documents: list[Document], length: int, count: int | None) -> LanguageSplit:
    """At most `count` windows (None: all) of at most `length` bytes. `path` is what errors call the text.

    Raises:
        ValueError: if there is no window, or a file can't be read.
    """
    usable = [replace(document, stop=document.stop - (document.size % length == 1)) for document in documents]
    lengths = [np.full(-(-document.size // length), length) for document in usable]
    for document, own in zip(usable, lengths, strict=True):
        own[len(own) - 1 :] -= len(own) * length - document.size
    continues = np.concatenate([np.arange(len(own)) > 0 for own in lengths] or [np.zeros(0, bool)])[:count]
    flat = np.concatenate(lengths or [np.zeros(0, np.int64)])[:count]
    if not len(flat):
        raise ValueError(f"{path} holds no text: expected at least two bytes in one file of each split")
    return LanguageSplit(Ragged.from_lengths(_bytes(usable)[: flat.sum()], flat), continues=continues)


def _bytes(documents: list[Document]) -> np.ndarray:
    """All bytes of the documents, mapped; uint8, (sum of sizes,)."""
    if len(documents) == 1:
        document = documents[0]
        try:
            return np.memmap(document.path, np.uint8, "r", document.start, (document.size,))
        except OSError as error:
            raise ValueError(f"cannot read {document.path}: {error.strerror or error}") from error
    total, folder = sum(document.size for document in documents), _store_folder()
    try:
        with tempfile.TemporaryFile(dir=folder) as store:
            for document in documents:
                for block in _blocks(document):
                    store.write(block)
            store.flush()
            return np.memmap(store, np.uint8, "r", 0, (total,))
    except OSError as error:
        raise ValueError(
            f"cannot keep {total} bytes of text in {folder}: {error.strerror or error}; free some space, or name a "
            "folder on a larger disk in the environment variable TMPDIR"
        ) from error


def _store_folder() -> str:
    """Where a copy of the text may lie."""
    if named := os.environ.get("TMPDIR"):
        return named
    return _LARGE_FILES if os.access(_LARGE_FILES, os.W_OK | os.X_OK) else tempfile.gettempdir()


def _blocks(document: Document) -> Iterator[bytes]:
    """The bytes of a document, some at a time.

    Raises:
        ValueError: if they can't be read, or there are fewer than there were.
    """
    left = document.size
    try:
        with document.path.open("rb") as file:
            file.seek(document.start)
            while left and (block := file.read(min(left, _COPIED_AT_ONCE))):
                left -= len(block)
                yield block
    except OSError as error:
        raise ValueError(f"cannot read {document.path}: {error.strerror or error}") from error
    if left:
        raise ValueError(f"{document.path} became shorter while it was read: leave the files alone until the end")
