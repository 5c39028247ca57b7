r"""The released ListOps files: one tab-separated expression and label per line, after a header.

`Source<TAB>Target`, then for instance `( ( ( [MAX 2 ) 9 ) ] )<TAB>9`; lines end in CRLF or LF. A full-size file is over
half a gigabyte, so it is parsed a block of lines at a time in numpy. Lines that are spelt in an unusual way (symbols
outside the vocabulary, parentheses glued to digits) go through `tokenize`, the definition; both give the same ids.

Every line is checked (columns, label, balance), none is evaluated: whether the labels are right is not looked at.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from subquad.tasks.listops_expression import MAX, MED, MIN, SM, UNKNOWN_TOKEN_ID, tokenize
from subquad.tasks.splits import LabelledSplit, Ragged

FILE_NAMES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
HEADER = b"Source\tTarget"

_BLOCK_BYTES = 1 << 22
_EXAMPLE = r"'( ( ( [MAX 2 ) 9 ) ] )<TAB>9'"
_TAB, _NEWLINE, _RETURN, _SPACE, _ZERO, _NINE = b"\t\n\r 09"


def _byte_classes() -> np.ndarray:
    """Token id of the byte a symbol starts with, 0 for what separates symbols, UNKNOWN for letters and all else."""
    classes = np.full(256, UNKNOWN_TOKEN_ID, dtype=np.uint8)
    classes[list(b" ()")] = 0
    classes[list(b"0123456789")] = np.arange(1, 11)
    classes[list(b"[]")] = 11, 15
    return classes


_CLASSES = _byte_classes()
_PAIRS = {"parentheses": b"()", "brackets": b"[]"}


def read_tsv(path: Path) -> LabelledSplit:
    """All examples of one file, tokens uint8.

    Raises:
        ValueError: if the file can't be read, or for the first malformed line; names file and line.
    """
    blocks = []
    try:
        with path.open("rb") as file:
            _check_header(path, file.readline(1000))
            line = 2
            for block in _blocks(file):
                blocks.append(_parse_block(path, line, block))
                line += len(blocks[-1][2])
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    if not blocks:
        raise ValueError(f"{path} has a header but no examples: expected lines like {_EXAMPLE}")
    tokens, lengths, labels = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return LabelledSplit(Ragged.from_lengths(tokens, lengths), labels)


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """Whole lines, some megabytes at a time, each ending in a newline."""
    while block := file.read(_BLOCK_BYTES):
        block += file.readline()
        yield block if block.endswith(b"\n") else block + b"\n"


def _check_header(path: Path, line: bytes) -> None:
    if not line:
        raise ValueError(f"{path} is empty: expected the header 'Source<TAB>Target' and lines like {_EXAMPLE}")
    _check_utf8(path, 1, line)
    if line.rstrip(b"\r\n") != HEADER:
        raise ValueError(
            f"{path}, line 1: expected the header 'Source<TAB>Target', got {_shown(line)}: "
            f"put the header first, then lines like {_EXAMPLE}"
        )


def _check_utf8(path: Path, first_line: int, block: bytes) -> None:
    if block.isascii():
        return
    try:
        block.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + block.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}, line {line}: expected UTF-8 text, got byte 0x{block[error.start]:02x}: "
            "save the file as UTF-8, or unpack it first if it is compressed"
        ) from error


def _shown(line: bytes) -> str:
    text = repr(line.decode("utf-8", errors="replace"))
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(line)} bytes)"


class _Lines:
    """Where the lines of a block start, end and have their tab; makes the errors that name one of them.

    The block is padded with spaces, so that looking just before the first line or after the last one is safe.
    """

    def __init__(self, path: Path, first_line: int, block: bytes) -> None:
        self.path = path
        self.first_line = first_line
        self.bytes = np.frombuffer(bytearray(b" " + block + b"    "), dtype=np.uint8)
        self.ends = np.flatnonzero(self.bytes == _NEWLINE)
        self.starts = np.concatenate([[1], self.ends[:-1] + 1])
        self.tabs = np.flatnonzero(self.bytes == _TAB)
        counts = np.diff(np.searchsorted(self.tabs, self.ends), prepend=0)
        self.require(counts == 1, "expected one tab, between Source and Target")
        self.stops = self.ends - (self.bytes[self.ends - 1] == _RETURN)

    def require(self, good: np.ndarray, expected: str) -> None:
        if good.all():
            return
        index = int(np.argmin(good))
        line = self.bytes[self.starts[index] : self.ends[index]].tobytes()
        raise ValueError(
            f"{self.path}, line {self.first_line + index}: {expected}, got {_shown(line)}: "
            f"correct or remove the line; a line looks like {_EXAMPLE}"
        )

    def blank_targets(self) -> None:
        """Overwrite tab, label and line end with spaces: what is left is expressions."""
        for positions in (self.tabs, self.tabs + 1, self.stops, self.ends):
            self.bytes[positions] = _SPACE


def _parse_block(path: Path, first_line: int, block: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens uint8 (sum of lengths,), lengths int64 (n,) and labels int64 (n,) of whole lines."""
    _check_utf8(path, first_line, block)
    lines = _Lines(path, first_line, block)
    label = lines.bytes[lines.tabs + 1]
    is_digit = (lines.stops - lines.tabs == 2) & (label >= _ZERO) & (label <= _NINE)
    lines.require(is_digit, "expected one digit from 0 to 9 after the tab")
    for name, pair in _PAIRS.items():
        lines.require(_balanced(lines, *pair), f"expected an expression with balanced {name}")
    labels = label.astype(np.int64) - _ZERO
    lines.blank_targets()
    tokens, lengths = _tokenize_plain(lines) or _tokenize_each(lines)
    lines.require(lengths > 0, "expected an expression before the tab")
    return tokens, lengths, labels


def _balanced(lines: _Lines, opening: int, closing: int) -> np.ndarray:
    """Whether each line closes all that it opens, and nothing before; bool, (n,)."""
    steps = (lines.bytes == opening).view(np.int8) - (lines.bytes == closing).view(np.int8)
    depth = np.cumsum(steps, dtype=np.int32)
    before = depth[lines.starts - 1]
    return (depth[lines.ends] == before) & (np.minimum.reduceat(depth, lines.starts) >= before)


def _tokenize_plain(lines: _Lines) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens and lengths of lines that hold nothing but symbols and parentheses, each between spaces, else None."""
    classes = _CLASSES[lines.bytes]
    positions = np.flatnonzero((classes > 0) & (classes < UNKNOWN_TOKEN_ID))
    tokens = classes[positions]
    operators = positions[lines.bytes[positions] == ord("[")]
    ids = _operator_ids(lines.bytes, operators)
    # A letter that belongs to no operator, or two symbols with no space between, make one of these counts too large.
    letters = 3 * np.count_nonzero(ids) - np.count_nonzero(ids == SM)
    filled = lines.bytes != _SPACE
    is_plain = (
        ids.all()
        and np.count_nonzero(classes == UNKNOWN_TOKEN_ID) == letters
        and np.count_nonzero(filled[1:] & filled[:-1]) == letters
    )
    if not is_plain:
        return None
    tokens[lines.bytes[positions] == ord("[")] = ids
    return tokens, np.diff(np.searchsorted(positions, lines.ends), prepend=0)


def _operator_ids(text: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Ids of the operators whose opening brackets stand at `positions`, 0 for those not in the vocabulary."""
    ids = np.zeros(len(positions), dtype=np.uint8)
    first, second, third = (text[positions + offset] for offset in (1, 2, 3))
    for symbol, name in ((MIN, b"MIN"), (MAX, b"MAX"), (MED, b"MED"), (SM, b"SM ")):
        ids[(first == name[0]) & (second == name[1]) & (third == name[2])] = symbol
    return ids


def _tokenize_each(lines: _Lines) -> tuple[np.ndarray, np.ndarray]:
    text = lines.bytes.tobytes()
    bounds = zip(lines.starts.tolist(), lines.ends.tolist(), strict=True)
    tokens = [tokenize(text[start:end].decode("utf-8")) for start, end in bounds]
    return np.concatenate(tokens), np.array([len(row) for row in tokens], dtype=np.int64)
