"""Files of the user's own: which there are, and which split each belongs to where their names say so.

A folder names its splits when it directly holds files or folders for training and for test: `train`, `train.txt`,
`wiki.train.raw`, `train-00000-of-00002.parquet`, and in place of "train" also "training", "test", and for validation
"validation", "valid", "val" or "dev". Then nothing else in the folder is read. Validation may be missing; the task then
takes it out of train. Names that begin with a dot are never read.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz"}


def entries(folder: Path) -> list[Path]:
    """What lies directly in a folder, by name, hidden names left out.

    Raises:
        ValueError: if the folder can't be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ValueError(f"cannot read {folder}: {error.strerror or error}") from error


def given_splits(folder: Path) -> dict[str, list[Path]] | None:
    """Files and folders by split (train, perhaps validation, test), or None where the names tell no splits.

    Raises:
        ValueError: if there is a train and a validation split but none for test, or the folder can't be read.
    """
    found: dict[str, list[Path]] = {}
    for path in entries(folder):
        words = {_SPLIT_WORDS[word] for word in re.split(r"[._-]", path.name.lower()) if word in _SPLIT_WORDS}
        if len(words) == 1:
            found.setdefault(words.pop(), []).append(path)
    if found.keys() == {"train", "validation"}:
        raise ValueError(
            f"{folder} holds {found['train'][0].name} and {found['validation'][0].name}, but nothing for test: add "
            "one, called test, or leave the splits out of the names to have them made"
        )
    order = [split for split in ("train", "validation", "test") if split in found]
    return {split: found[split] for split in order} if {"train", "test"} <= found.keys() else None


def files_below(path: Path) -> list[Path]:
    """The file itself, or all files below a folder, by path, hidden ones left out.

    Raises:
        ValueError: if there is nothing there, a folder holds no file, or a file is compressed.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    found = [path] if not path.is_dir() else _walk(path)
    if not found:
        raise ValueError(f"{path} holds no files: expected at least one")
    for file in found:
        if file.suffix.lower() in _COMPRESSED:
            raise ValueError(f"{file} is compressed, its bytes are no text: unpack it first")
    return found


def _walk(folder: Path) -> list[Path]:
    found: list[Path] = []
    for path in entries(folder):
        if path.is_dir() and not path.is_symlink():
            found += _walk(path)
        elif path.is_file():
            found.append(path)
    return found


def name_rank(name: str) -> bytes:
    """What names are sorted by to be in an order that is random but always the same."""
    return hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest()
