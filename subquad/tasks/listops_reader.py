"""Finds ListOps files in the layouts in which they go around and turns them into `ClassificationData`.

The parsed tokens are kept beside the files in `listops-tokens.npz`, a tenth of their size. That copy is used only while
the files have the size and modification time they had when it was made, and is made anew when it is damaged; a folder
that can't be written works without it.
"""

import contextlib
import json
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from subquad.tasks.base import hash_splits
from subquad.tasks.kinds import ClassificationData
from subquad.tasks.listops_expression import NUM_LABELS, PAD_TOKEN_ID, VOCAB_SIZE
from subquad.tasks.listops_tsv import FILE_NAMES, read_tsv
from subquad.tasks.splits import LabelledSplit, Ragged

CACHE_NAME = "listops-tokens.npz"
_CACHE_VERSION = 1
_FOLDERS = (".", "listops-1000", "lra_release/listops-1000", "lra_release/lra_release/listops-1000", "listops")
_DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What numpy and zipfile raise for bytes they can't read; RuntimeError where these look like an encrypted archive."""


def find_listops(directory: Path) -> Path:
    """The folder at or below `directory` that holds the three files.

    Raises:
        ValueError: if there is none, or files are missing from it.
    """
    for folder in (directory / name for name in _FOLDERS):
        missing = [name for name in FILE_NAMES.values() if not (folder / name).is_file()]
        if not missing:
            return folder
        if len(missing) < len(FILE_NAMES):
            raise ValueError(
                f"{folder} lacks {', '.join(missing)}: expected {', '.join(FILE_NAMES.values())} side by side"
            )
    raise ValueError(
        f"no ListOps data in {directory}: expected {', '.join(FILE_NAMES.values())} there or in "
        f"{', '.join(_FOLDERS[1:])} below it"
    )


def read_listops(
    directory: Path,
    max_length: int = 2000,
    *,
    preset: str = "release",
    title: str = "ListOps (Long Range Arena)",
    is_lra: bool = True,
) -> ClassificationData:
    """Read the files at or below `directory`, generated here or released with Long Range Arena.

    Args:
        directory: see `find_listops`.
        max_length: longest expression allowed, in tokens. The official code would cut a longer one and keep its label;
            none of the released ones is.
        preset: name to put into the result.
        title: likewise.
        is_lra: likewise.

    Raises:
        ValueError: if files are missing or malformed, or an expression is too long; names file and line.
    """
    folder = find_listops(directory)
    splits = _read_cache(folder)
    if splits is None:
        before = _fingerprint(folder)
        splits = {split: read_tsv(folder / name) for split, name in FILE_NAMES.items()}
        _write_cache(folder, before, splits)
    for split, name in FILE_NAMES.items():
        _check_lengths(folder / name, splits[split].lengths, max_length)
    return ClassificationData(
        name="listops",
        preset=preset,
        title=title,
        is_lra=is_lra,
        vocab_size=VOCAB_SIZE,
        pad_token_id=PAD_TOKEN_ID,
        num_labels=NUM_LABELS,
        max_length=max_length,
        metric="accuracy",
        data_hash=hash_splits(splits["train"], splits["validation"], splits["test"]),
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
    )


def _check_lengths(path: Path, lengths: np.ndarray, max_length: int) -> None:
    if lengths.max() > max_length:
        index = int(np.argmax(lengths > max_length))
        raise ValueError(
            f"{path}, line {index + 2}: expected at most {max_length} tokens, got {lengths[index]}: "
            f"raise max_length to {lengths.max()} or use a preset for longer expressions"
        )


def _fingerprint(folder: Path) -> str:
    stats = {name: (folder / name).stat() for name in FILE_NAMES.values()}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return json.dumps({"version": _CACHE_VERSION, "files": files}, sort_keys=True)


def _read_cache(folder: Path) -> dict[str, LabelledSplit] | None:
    """The splits as parsed before, or None if that was never done, is out of date, or is damaged."""
    try:
        with (folder / CACHE_NAME).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if str(arrays["fingerprint"]) != _fingerprint(folder):
                return None
            return {
                split: LabelledSplit(
                    Ragged(arrays[f"{split}_tokens"], arrays[f"{split}_offsets"]), arrays[f"{split}_labels"]
                )
                for split in FILE_NAMES
            }
    except _DAMAGED:
        return None


def _write_cache(folder: Path, fingerprint: str, splits: dict[str, LabelledSplit]) -> None:
    arrays = {"fingerprint": np.array(fingerprint)}
    for name, split in splits.items():
        offsets, labels, tokens = split.arrays()
        arrays |= {f"{name}_tokens": tokens, f"{name}_offsets": offsets, f"{name}_labels": labels}
    partial = folder / f".{CACHE_NAME}-{os.getpid()}"
    # Only speed is lost if the folder is read-only or full: the next call parses again.
    with contextlib.suppress(OSError):
        try:
            with partial.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            partial.replace(folder / CACHE_NAME)
        finally:
            partial.unlink(missing_ok=True)
