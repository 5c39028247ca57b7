"""Texts with a label each, from files in the layouts in which people keep them.

    folder      one folder for each class, one file for each text
    .csv .tsv   a column of texts and one of labels, called so in the first line
    .parquet    likewise; needs pyarrow

Tables are UTF-8, with a byte order mark or without. Every text needs a label.

A column of texts is called text, sentence, content, review or document, one of labels label, class, category, target or
sentiment, in capitals or not.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from subquad.tasks.own_files import entries, files_below

TEXT_COLUMNS = ("text", "sentence", "content", "review", "document")
LABEL_COLUMNS = ("label", "class", "category", "target", "sentiment")


class LabelledText(NamedTuple):
    """One text.

    Attributes:
        name: of file or row, unique among the texts that are read together.
        text: its bytes, UTF-8 where they come from a table.
        label: name of its class.
    """

    name: str
    text: bytes
    label: str


def read_labelled(path: Path) -> list[LabelledText]:
    """All texts of a folder with a folder for each class, or of a table; empty texts are left out.

    Raises:
        ValueError: if there is nothing, it can't be read, or it has another layout; names the file and what to do.
    """
    if path.is_dir():
        texts = list(_of_folder(path))
    else:
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            known = ", ".join(_READERS)
            raise ValueError(f"{path}: expected a folder with a folder for each class, or a table ({known})")
        texts = list(reader(path))
    texts = [text for text in texts if text.text]
    if not texts:
        raise ValueError(f"{path} holds no text with a label")
    return texts


def _of_folder(folder: Path) -> Iterable[LabelledText]:
    classes = [path for path in entries(folder) if path.is_dir()]
    if len(classes) < 2:
        raise ValueError(
            f"{folder} holds {len(classes)} folders: expected one for each class, at least two, with a file for each "
            "text"
        )
    for of_class in classes:
        for file in files_below(of_class):
            try:
                yield LabelledText(file.relative_to(folder).as_posix(), file.read_bytes(), of_class.name)
            except OSError as error:
                raise ValueError(f"cannot read {file}: {error.strerror or error}") from error


def _of_csv(path: Path) -> Iterable[LabelledText]:
    csv.field_size_limit(sys.maxsize)  # a long text is what this library is for
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            header = next(rows, None)
            if header is None:
                raise ValueError(f"{path} is empty: expected columns called text and label")
            text, label = _columns(path, header)
            for row in rows:
                if row and len(row) != len(header):
                    raise ValueError(
                        f"{path}, line {rows.line_num}: expected {len(header)} columns as in the first line, got "
                        f"{len(row)}"
                    )
                if row:
                    found = LabelledText(f"{path.name}:{rows.line_num}", row[text].encode(), row[label])
                    yield _with_label(found, f"{path}, line {rows.line_num}")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a table in UTF-8: {error}") from error


def _of_parquet(path: Path) -> Iterable[LabelledText]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{path}: Parquet files need pyarrow; install it with: pip install 'subquad[data]'") from error
    try:
        with ParquetFile(path) as table:
            names = table.schema_arrow.names
            text, label = (names[column] for column in _columns(path, names))
            row = 0
            for batch in table.iter_batches(columns=[text, label]):
                for content, of_class in zip(*(batch.column(name).to_pylist() for name in (text, label)), strict=True):
                    row += 1
                    named = "" if of_class is None or of_class != of_class else str(of_class)  # NaN is missing too
                    found = LabelledText(f"{path.name}:{row}", _bytes(path, row, content), named)
                    yield _with_label(found, f"{path}, row {row}")
    except (OSError, ArrowException) as error:
        raise ValueError(f"{path}: not a Parquet file that can be read: {error}") from error


def _bytes(path: Path, row: int, content: object) -> bytes:
    if isinstance(content, str):
        return content.encode()
    raise ValueError(f"{path}, row {row}: expected a text, got {content!r}")


def _with_label(found: LabelledText, place: str) -> LabelledText:
    """The same; an empty text, which is left out, needs no label."""
    if found.text and not found.label.strip():
        raise ValueError(f"{place}: the text has no label: give it one, or take the row out")
    return found


def _columns(path: Path, header: Sequence[str]) -> tuple[int, int]:
    """Where texts and labels stand."""
    lower = [name.strip().lower() for name in header]
    found = []
    for role, names in (("texts", TEXT_COLUMNS), ("labels", LABEL_COLUMNS)):
        places = [lower.index(name) for name in names if name in lower]
        if not places:
            raise ValueError(
                f"{path}: expected a column of {role}, called {', '.join(names[:-1])} or {names[-1]}; it has "
                f"{', '.join(header) or 'none'}"
            )
        found.append(places[0])
    return found[0], found[1]


_READERS: dict[str, Callable[[Path], Iterable[LabelledText]]] = {
    ".csv": _of_csv,
    ".tsv": _of_csv,
    ".parquet": _of_parquet,
}
