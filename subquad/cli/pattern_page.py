"""What `subquad show` prints of a pattern that is written out: who attends whom, and how many keys a query has."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from subquad.cli.console import ACCENT, QUIET, plain_table
from subquad.cli.picture import side_by_side
from subquad.drawing import Drawing, Panel
from subquad.patterns.expression import CONSTRUCTORS, parse_pattern, write_pattern
from subquad.patterns.picture import draw_pattern
from subquad.records import units
from subquad.records.mechanisms import Picture

ALL_HEADS = "all heads"


@dataclass(frozen=True)
class Counted:
    """What the queries of one head see.

    Attributes:
        visible_pairs: of all queries together.
        least_keys: of the query that sees fewest.
        most_keys: of the query that sees most.
        queries_without_keys: attention gives 0 there.
    """

    visible_pairs: int
    least_keys: int
    most_keys: int
    queries_without_keys: int


@dataclass(frozen=True)
class ShownPattern:
    """A pattern as it is shown.

    Attributes:
        expression: the pattern as text.
        causal: whether no query sees a later key.
        length: tokens that are counted.
        counts: "all heads", or "head 0" and so on, to what its queries see.
        pictures: likewise to who attends whom, of fewer tokens.
        drawing: the picture for a file.
    """

    expression: str
    causal: bool
    length: int
    counts: dict[str, Counted]
    pictures: dict[str, Picture]
    drawing: Drawing


def is_pattern(name: str) -> bool:
    """Whether the argument of `subquad show` is meant as a pattern: mechanisms have no parentheses."""
    first = re.match(r"[\s(~]*(\w+)\s*(\(?)", name)
    return first is not None and ".py:" not in name and (bool(first[2]) or first[1] in CONSTRUCTORS)


def read_pattern(
    text: str, assignments: list[str], *, length: int | None, causal: bool, picture_length: int | None
) -> ShownPattern:
    """Read, count and draw a pattern.

    Args:
        text: as `parse_pattern` reads it.
        assignments: options of a mechanism; a pattern has none.
        length: tokens to count; None for those of the picture.
        causal: asks for a form of a mechanism; a pattern has none.
        picture_length: tokens in the picture; None for as many as show the structure.

    Raises:
        ValueError: what isn't understood, or what a pattern doesn't have.
    """
    if assignments:
        raise ValueError(f"--set speaks of a mechanism; a pattern holds its numbers itself, got {assignments[0]!r}")
    if causal:
        raise ValueError(f"--causal speaks of a mechanism; write 'Causal() & ({text})' instead")
    if length is not None and length < 1:
        raise ValueError(f"--length must be at least 1 token, got {length}")
    pattern = parse_pattern(text)
    drawing = draw_pattern(pattern, picture_length)
    counted = drawing.length if length is None else length
    titles = [panel.title or ALL_HEADS for panel in drawing.panels]
    keys = pattern.keys_per_query(counted).reshape(len(titles), counted)
    return ShownPattern(
        expression=write_pattern(pattern),
        causal=pattern.causal,
        length=counted,
        counts={title: _count(of_head) for title, of_head in zip(titles, keys.tolist(), strict=True)},
        pictures={title: _merged(panel) for title, panel in zip(titles, drawing.panels, strict=True)},
        drawing=drawing,
    )


def _count(keys: list[int]) -> Counted:
    return Counted(sum(keys), min(keys), max(keys), keys.count(0))


def _merged(panel: Panel) -> Picture:
    """All layers of a panel in one."""
    rows = zip(*(layer.rows for layer in panel.layers), strict=True)
    merged = tuple("".join("01"["1" in cells] for cells in zip(*row, strict=True)) for row in rows)
    return Picture(length=len(merged), rows=merged)


def document(shown: ShownPattern) -> dict[str, Any]:
    """Everything, JSON-ready."""
    return {
        "pattern": shown.expression,
        "causal": shown.causal,
        "length": shown.length,
        "counts": {title: asdict(counted) for title, counted in shown.counts.items()},
        "pictures": {title: list(picture.rows) for title, picture in shown.pictures.items()},
    }


def render(shown: ShownPattern, width: int) -> Group:
    """The page, for a terminal of `width` columns."""
    form = "no query sees a later key" if shown.causal else "queries see later keys too"
    table = plain_table()
    for title in ("", "visible pairs", "of all", "keys a query", "queries without a key"):
        table.add_column(title, justify="right" if title else "left")
    for title, counted in shown.counts.items():
        keys = f"{units.count(counted.least_keys)} to {units.count(counted.most_keys)}"
        share = units.percent(counted.visible_pairs / shown.length**2)
        pairs, without = units.count(counted.visible_pairs), units.count(counted.queries_without_keys)
        table.add_row(title, pairs, share, keys, without)
    drawn = units.count(shown.drawing.length)
    note = Text(f"Rows are queries, columns are keys, {drawn} tokens; filled where a query sees a key.", QUIET)
    pictures = side_by_side(list(shown.pictures.items()), width - 2)
    return Group(
        Text(shown.expression, f"bold {ACCENT}"),
        Text(f"{units.count(shown.length)} tokens; {form}", QUIET),
        "",
        table,
        Text("\nWho attends whom", f"bold {ACCENT}"),
        Padding(Group(note, "", pictures), (0, 0, 0, 2)),
    )
