"""Text that every installation of Python carries: the sources of its standard library.

English in comments and docstrings, and code, in a few megabytes of documents, one a file. Which bytes these are depends
on the version of Python, so that scores compare between machines only where `data_hash` is the same.
"""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path

from subquad.tasks.base import DataPreset
from subquad.tasks.own_files import name_rank
from subquad.tasks.splits import LanguageSplit
from subquad.tasks.text_corpus import Document, divide

_LEFT_OUT = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}


def library_folder() -> Path:
    """Where the standard library lies.

    Raises:
        ValueError: if it isn't there as files.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    if not folder.is_dir():
        raise ValueError(
            f"this Python has no sources of its standard library at {folder}: name text of your own with --data PATH"
        )
    return folder


def library_documents(most_bytes: int) -> list[Document]:
    """Source files, so many that they hold at most `most_bytes` together, in an order that names alone decide.

    Raises:
        ValueError: if there are no sources.
    """
    folder, taken, size = library_folder(), [], 0
    names = [path.relative_to(folder) for path in folder.rglob("*.py")]
    names = [name for name in names if _LEFT_OUT.isdisjoint(name.parts)]
    for name in sorted(names, key=lambda name: name_rank(name.as_posix())):
        document = Document.whole(folder / name, name.as_posix())
        if document.size and size + document.size <= most_bytes:
            taken.append(document)
            size += document.size
    return taken


def library_splits(preset: DataPreset) -> tuple[dict[str, LanguageSplit], str]:
    """About as many windows as the preset asks for, and what the text is called.

    Raises:
        ValueError: if there are no sources, or too few for the preset's windows.
    """
    documents = library_documents(sum(preset.counts.values()) * preset.max_length)
    splits = divide(library_folder(), documents, preset)
    return splits, f"Sources of Python {platform.python_version()}"
