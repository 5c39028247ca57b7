"""Who attends whom, in the terminal: a row a query, a column a key, two rows in each line of characters.

Half blocks are as wide as they are high, so the diagonal of a picture is a diagonal. Without colour the drawing is the
same: what is not seen stays blank inside the frame.
"""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from subquad.cli.console import ACCENT, QUIET
from subquad.records.mechanisms import Picture

_BLOCKS = {"11": "█", "10": "▀", "01": "▄", "00": " "}


def picture_lines(picture: Picture) -> list[str]:
    """The picture in half blocks: `length` characters in each of (length + 1) // 2 lines."""
    rows = [*picture.rows, "0" * picture.length]
    pairs = zip(rows[0 : picture.length : 2], rows[1 : picture.length + 1 : 2], strict=True)
    return ["".join(_BLOCKS[upper + lower] for upper, lower in zip(*pair, strict=True)) for pair in pairs]


def framed(picture: Picture, title: str) -> Text:
    """The picture in a frame, with its title above."""
    edge = "─" * picture.length
    text = Text(no_wrap=True).append(f" {title}\n", "bold").append(f"┌{edge}┐\n", QUIET)
    for line in picture_lines(picture):
        text.append("│", QUIET).append(line, ACCENT).append("│\n", QUIET)
    return text.append(f"└{edge}┘", QUIET)


def _too_wide(picture: Picture, title: str) -> Text:
    needed = f"{picture.length + 2} columns are needed here; --picture draws fewer tokens, --output writes a file"
    return Text(f" {title}\n", "bold").append(f" {needed}", QUIET)


def side_by_side(pictures: list[tuple[str, Picture]], width: int) -> Group:
    """Pictures with their titles beside each other, below each other where `width` columns don't suffice.

    A picture that is wider by itself is told of and not drawn.
    """
    drawn = [
        framed(picture, title) if picture.length + 2 <= width else _too_wide(picture, title)
        for title, picture in pictures
    ]
    needed = sum(picture.length + 2 for _, picture in pictures) + 4 * (len(pictures) - 1)
    if needed > width:
        return Group(*drawn)
    table = Table.grid(padding=(0, 4, 0, 0))
    table.add_row(*drawn)
    return Group(table)
