"""What `subquad show --error` prints: how far a mechanism is from exact softmax attention."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from subquad.benchmark.approximation_error import (
    LENGTHS,
    SCALES,
    ErrorPoint,
    Qkv,
    approximation_errors,
    random_qkv,
    read_qkv,
)
from subquad.cli.console import QUIET, plain_table
from subquad.config import field_names, nearest
from subquad.interface import MixerConfig
from subquad.records import units


def read_errors(
    config: MixerConfig,
    *,
    sweeps: list[str],
    qkv: Path | None,
    length: int | None,
    sizes: tuple[int, int],
    causal: bool,
) -> list[ErrorPoint]:
    """Measure.

    Args:
        config: the mechanism.
        sweeps: options to turn, each as name=value,value; none for those that cost.
        qkv: the user's own queries, keys and values; None for random ones.
        length: tokens; None for several lengths, or all tokens of the user's own.
        sizes: heads, and width of a head, of random ones.
        causal: the form.

    Raises:
        ValueError: what isn't understood, or what the mechanism or the file doesn't have.
    """
    asked = dict(_parse_sweep(config, text) for text in sweeps) or None
    inputs = _random(length, sizes) if qkv is None else [_cut(read_qkv(qkv), length)]
    return approximation_errors(config, inputs, sweeps=asked, causal=causal)


def _random(length: int | None, sizes: tuple[int, int]) -> list[Qkv]:
    lengths = LENGTHS if length is None else (length,)
    heads, width = sizes
    return [random_qkv(each, num_heads=heads, head_dim=width, scale=scale) for each in lengths for scale in SCALES]


def _cut(given: Qkv, length: int | None) -> Qkv:
    has = given.q.shape[2]
    if length is not None and length > has:
        raise ValueError(f"--length={length} exceeds the {has} tokens of {given.source}")
    return given if length is None else given.first(length)


def _parse_sweep(config: MixerConfig, text: str) -> tuple[str, list[int]]:
    name, _, values = text.partition("=")
    known = field_names(type(config))
    if name not in known:
        raise ValueError(f"{config.name}: unknown option {name!r}; {nearest(name, known)}")
    try:
        return name, [int(value) for value in values.split(",")]
    except ValueError as error:
        raise ValueError(f"--option: expected whole numbers as {name}=64,128,256, got {text!r}") from error


def error_document(points: list[ErrorPoint]) -> list[dict[str, Any]]:
    """The points, JSON-ready; null where a figure isn't finite."""
    written = [asdict(point) for point in points]
    for point in written:
        point |= {name: point[name] if math.isfinite(point[name]) else None for name in ("mean", "worst", "averaging")}
    return written


def render_errors(points: list[ErrorPoint]) -> RenderableType:
    """A table for every option that is turned, and what its figures are."""
    note = (
        "|y - softmax| / |softmax| of a head: the mean, and the worst head. Averaging takes all values alike; what is "
        "no closer approximates nothing. N(0, s²) are random queries and keys, and values of N(0, 1)."
    )
    notes = " ".join(dict.fromkeys([note, *(point.note for point in points if point.note)]))
    names = dict.fromkeys(next(iter(point.options), "") for point in points)
    tables = [_table(name, [point for point in points if next(iter(point.options), "") == name]) for name in names]
    between = [part for table in tables for part in ("", Padding(table, (0, 0, 0, 2)))]
    return Group(Padding(Text(notes, QUIET), (0, 0, 0, 2)), *between)


def _table(name: str, points: list[ErrorPoint]) -> Table:
    """A row for each length and value, two columns for each source."""
    sources = list(dict.fromkeys(point.source for point in points))
    table = plain_table()
    table.add_column("\ntokens", justify="right", no_wrap=True)
    table.add_column(f"\n{name}", justify="right", no_wrap=True)
    for source in sources:
        table.add_column(f"{source}\nmean", justify="right")
        table.add_column("\nworst", justify="right", no_wrap=True)
    for length in dict.fromkeys(point.length for point in points):
        here = [point for point in points if point.length == length]
        for options in dict.fromkeys(tuple(point.options.values()) for point in here):
            row = {point.source: point for point in here if tuple(point.options.values()) == options}
            cells = [cell for source in sources for cell in (_figure(row[source].mean), _figure(row[source].worst))]
            table.add_row(units.count(length), *(map(units.count, options) if options else ("",)), *cells)
        of_source = {point.source: point.averaging for point in here}
        averaged = [cell for source in sources for cell in (Text(_figure(of_source[source]), QUIET), "")]
        table.add_row("", Text("averaging", QUIET), *averaged)
    return table


def _figure(error: float) -> str:
    if not math.isfinite(error):
        return "not finite"
    return f"{error:.3f}" if error >= 0.001 else f"{error:.0e}" if error else "0"
