"""Writes ListOps data: draws expressions, drops duplicates, splits, and puts the files in place once all are complete.

Work is cut into chunks of a fixed number of draws. Chunk i has its own random stream, the i-th child of the seed, and
chunks are consumed in order, so the files don't depend on how many processes drew them. Memory holds a few chunks and
one 16-byte digest per expression kept. Like the official generator, an expression appears once in all three splits
together, and the split is made after that: train first, then validation, then test.
"""

import contextlib
import hashlib
import itertools
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from subquad.records.atomic import sync
from subquad.tasks.base import DataPreset, Progress
from subquad.tasks.listops_manifest import MANIFEST_NAME, FileEntry, Manifest, Recipe
from subquad.tasks.listops_trees import Shape, draw_expressions, text_pieces
from subquad.tasks.listops_tsv import FILE_NAMES, HEADER

_DRAWS_PER_CHUNK = 4096
_PATIENCE_CHUNKS = 64
_LEAST_NEW_PER_DRAW = 1e-4
_PROGRESS_EVERY = 500
_LINE_END = b"\r\n"


class Row(NamedTuple):
    """One example: its line in the file, what tells it from others, and its statistics."""

    line: bytes
    digest: bytes
    length: int
    label: int


def generate(
    directory: Path, preset: DataPreset, *, seed: int = 0, workers: int = 1, progress: Progress | None = None
) -> Manifest:
    """Generate the three files and their manifest in `directory`, replacing what an earlier call left there.

    Args:
        directory: created if absent.
        preset: numbers of examples and bounds of the expressions.
        seed: the same seed gives the same bytes.
        workers: processes that draw; 1 stays in this one. More are started by spawning, so a script that asks for
            them must be guarded by `if __name__ == "__main__":`.
        progress: called every few hundred examples, and at the end.

    Raises:
        ValueError: if the preset's parameters make no sense, there are not enough different expressions, the folder
            can't be written, or a worker process dies.
    """
    recipe = Recipe.from_preset(preset, seed)
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    report = progress or (lambda done, total: None)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".generating-", dir=directory) as unfinished:
            with contextlib.closing(_chunks(recipe, workers)) as chunks:
                manifest = Manifest(recipe, _write_splits(Path(unfinished), recipe, chunks, report))
            _write_durably(Path(unfinished) / MANIFEST_NAME, manifest.to_json().encode())
            _publish(Path(unfinished), directory)
    except OSError as error:
        raise ValueError(
            f"cannot write ListOps data to {directory}: {error.strerror or error}; "
            "make room, or choose a folder that can be written"
        ) from error
    except BrokenProcessPool as error:
        raise ValueError(
            "a process drawing ListOps expressions died: use workers=1, or guard the calling script "
            'by `if __name__ == "__main__":`'
        ) from error
    return manifest


def draw_chunk(seed: int, shape: Shape, index: int) -> list[Row]:
    """The accepted expressions of one chunk, duplicates included, in the order drawn."""
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(index,)))
    pieces = text_pieces(shape.max_args)
    rows = []
    for codes, value in draw_expressions(words, _DRAWS_PER_CHUNK, shape):
        # The last piece is a bracket that closes a pair of a parent, too; the root has none.
        source = b"".join(map(pieces.__getitem__, codes)).removesuffix(b" ) ")
        digest = hashlib.blake2b(codes, digest_size=16).digest()
        rows.append(Row(b"%b\t%d%b" % (source, value, _LINE_END), digest, len(codes), value))
    return rows


def _chunks(recipe: Recipe, workers: int) -> Generator[list[Row], None, None]:
    """All chunks in order, without end; processes keep a few ahead."""
    draw = partial(draw_chunk, recipe.seed, recipe.shape)
    if workers == 1:
        yield from map(draw, itertools.count())
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_leave_interrupts_to_parent)
    try:
        pending = deque(pool.submit(draw, index) for index in range(2 * workers))
        for index in itertools.count(2 * workers):
            yield pending.popleft().result()
            pending.append(pool.submit(draw, index))
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _distinct(chunks: Iterator[list[Row]], recipe: Recipe) -> Iterator[Row]:
    """Rows whose expression has not come before.

    Raises:
        ValueError: once hardly anything new is drawn.
    """
    seen: set[bytes] = set()
    sizes = deque([0], maxlen=_PATIENCE_CHUNKS + 1)
    draws = _PATIENCE_CHUNKS * _DRAWS_PER_CHUNK
    for chunk in chunks:
        for row in chunk:
            if row.digest not in seen:
                seen.add(row.digest)
                yield row
        sizes.append(len(seen))
        new = sizes[-1] - sizes[0]
        if len(sizes) > _PATIENCE_CHUNKS and new < draws * _LEAST_NEW_PER_DRAW:
            raise ValueError(
                f"found {len(seen)} different expressions longer than {recipe.longer_than} and shorter than "
                f"{recipe.shorter_than} tokens, {sum(recipe.counts.values())} were asked for, and the last {draws} "
                f"draws gave {new} new: widen the bounds, raise max_depth or max_args, or ask for fewer"
            )


def _write_splits(directory: Path, recipe: Recipe, chunks: Iterator[list[Row]], report: Progress) -> list[FileEntry]:
    rows = _distinct(chunks, recipe)
    total = sum(recipe.counts.values())
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done % _PROGRESS_EVERY == 0 or done == total:
            report(done, total)

    return [
        _write_file(directory / FILE_NAMES[split], itertools.islice(rows, count), advance)
        for split, count in recipe.counts.items()
    ]


def _write_file(path: Path, rows: Iterator[Row], advance: Callable[[], None]) -> FileEntry:
    digest = hashlib.sha256()
    lengths, labels = [], []
    with path.open("wb") as file:
        for line in itertools.chain([HEADER + _LINE_END], _note(rows, lengths, labels, advance)):
            file.write(line)
            digest.update(line)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    counts = np.bincount(labels, minlength=10).tolist()
    mean = sum(lengths) / len(lengths)
    return FileEntry(path.name, len(labels), size, digest.hexdigest(), min(lengths), mean, max(lengths), counts)


def _note(rows: Iterator[Row], lengths: list[int], labels: list[int], advance: Callable[[], None]) -> Iterator[bytes]:
    """Lines of the rows; lengths and labels are appended as they pass."""
    for row in rows:
        lengths.append(row.length)
        labels.append(row.label)
        yield row.line
        advance()


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _publish(unfinished: Path, directory: Path) -> None:
    """Move the finished files into place, the manifest last; old ones go first, so that old and new never mix."""
    names = [*FILE_NAMES.values(), MANIFEST_NAME]
    for name in reversed(names):
        (directory / name).unlink(missing_ok=True)
    for name in names:
        (unfinished / name).rename(directory / name)
    sync(directory)
