"""Pictures of who attends whom, as the papers draw them: queries downwards, keys to the right, visible pairs filled.

A drawing is one square or several side by side; where a pattern is a union, each part has its colour. It is laid out
here, once, for every format, and written as SVG, which needs nothing but the standard library. The same drawing always
gives the same text, so that a generated file can be compared.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Scheme = Literal["auto", "light", "dark"]
"""For which background; auto follows the reader's."""

LONGEST = 512
"""Tokens of the largest picture."""

Anchor = Literal["start", "middle", "end"]

HUES = (
    ("#2678b8", "#5aaaea"),
    ("#e0812b", "#f2a257"),
    ("#2f9e78", "#4fc79e"),
    ("#a45ba8", "#cf8fd2"),
    ("#b8931c", "#e3c04f"),
    ("#c2504f", "#ee8785"),
)
"""Of the layers, light and dark."""

PAPER = {
    "page": ("#ffffff", "#1a1e25"),
    "unseen": ("#eceff4", "#272e38"),
    "text": ("#1d2129", "#e6e9ee"),
    "quiet": ("#5b6472", "#9aa4b2"),
}
"""Everything else, light and dark."""

SIDE = 240
MARGIN, BETWEEN = 14, 22
LEFT, TOP, TITLE, LINE = 30, 18, 22, 18
SMALLEST_RULED = 4
"""Cells at least so wide are ruled off from each other."""

_SANS = "system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif"
_CODE = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
_CODE_WIDTH = 6.7


class Layer(NamedTuple):
    """Pairs of one colour.

    Attributes:
        label: what the legend says; "" for no entry.
        rows: as many strings as queries, as many characters in each as keys: "1" for a visible pair, else "0".
    """

    label: str
    rows: tuple[str, ...]


class Panel(NamedTuple):
    """One square: a title or "", and its layers; where two share a pair, the first one shows."""

    title: str
    layers: tuple[Layer, ...]


class Square(NamedTuple):
    """Where a panel stands: its corner and the width of a cell, in pixels."""

    x: int
    y: int
    cell: int
    panel: Panel


class Swatch(NamedTuple):
    """A sample of the colour of a layer in the legend."""

    x: int
    y: int
    hue: int


class Words(NamedTuple):
    """A line of text, its baseline at y; `turned` ones read downwards."""

    x: int
    y: int
    text: str
    ink: Literal["text", "quiet"]
    anchor: Anchor = "start"
    turned: bool = False
    code: bool = False


class Sheet(NamedTuple):
    """A drawing laid out: everything that is on it, with its place in pixels."""

    width: int
    height: int
    squares: tuple[Square, ...]
    swatches: tuple[Swatch, ...]
    words: tuple[Words, ...]


@dataclass(frozen=True)
class Drawing:
    """Panels side by side, of equally many tokens, and a line below them or "".

    A notebook shows it as it is.
    """

    panels: tuple[Panel, ...]
    note: str = ""

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.panels[0].layers[0].rows)

    @property
    def labels(self) -> tuple[str, ...]:
        """Of all layers; a label's place is the number of its hue."""
        return tuple(dict.fromkeys(layer.label for panel in self.panels for layer in panel.layers))

    def hue(self, label: str) -> int:
        """The number of a layer's colour; the colours begin anew when they are used up."""
        return self.labels.index(label) % len(HUES)

    def sheet(self) -> Sheet:
        """Lay everything out."""
        cell = max(1, SIDE // self.length)
        side = cell * self.length
        top = MARGIN + TOP + (TITLE if any(panel.title for panel in self.panels) else 0)
        step = LEFT + side + BETWEEN
        squares = tuple(
            Square(MARGIN + LEFT + step * index, top, cell, panel) for index, panel in enumerate(self.panels)
        )
        width = 2 * MARGIN + step * len(squares) - BETWEEN
        words = [each for square in squares for each in _axes(square, side, self.length)]
        swatches, legend, bottom = self._legend(top + side + 12, width)
        return Sheet(width, bottom + MARGIN, squares, swatches, (*words, *legend))

    def _legend(self, y: int, width: int) -> tuple[tuple[Swatch, ...], list[Words], int]:
        """The samples of colour, the lines beside and below them, and where they end."""
        swatches, words = [], []
        for label in filter(None, self.labels):
            swatches.append(Swatch(MARGIN + LEFT, y + 2, self.hue(label)))
            words.append(Words(MARGIN + LEFT + 18, y + 12, _fitted(label, width, 18), "text", code=True))
            y += LINE
        if self.note:
            words.append(Words(MARGIN + LEFT, y + 12, _fitted(self.note, width, 0), "quiet", code=True))
            y += LINE
        return tuple(swatches), words, y if words else y - 12

    def svg(self, scheme: Scheme = "auto") -> str:
        """The drawing as the text of an SVG file."""
        sheet = self.sheet()
        described = "; ".join(filter(None, (*(panel.title for panel in self.panels), *self.labels, self.note)))
        parts = [
            f"<title>Who attends whom: {html.escape(described)}</title>",
            f"<style>{_styles(scheme, min(len(self.labels), len(HUES)))}</style>",
            f'<rect class="sq-page" width="{sheet.width}" height="{sheet.height}" rx="6"/>',
            *(self._square(square) for square in sheet.squares),
            *(f'<rect class="sq-{s.hue}" x="{s.x}" y="{s.y}" width="11" height="11" rx="2"/>' for s in sheet.swatches),
            *map(_text, sheet.words),
        ]
        size = f'width="{sheet.width}" height="{sheet.height}" viewBox="0 0 {sheet.width} {sheet.height}"'
        body = "\n".join(parts)
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{body}\n</svg>\n'

    def _square(self, square: Square) -> str:
        n = self.length
        layers = "".join(
            f'<path class="sq-{self.hue(layer.label)}" d="{cells_path(layer.rows)}"/>'
            for layer in reversed(square.panel.layers)
        )
        lines = "".join(f"M0 {k}h{n}M{k} 0v{n}" for k in range(1, n)) if square.cell >= SMALLEST_RULED else ""
        rules = f'<path class="sq-rule" stroke-width="{1 / square.cell:.3g}" d="{lines}"/>' if lines else ""
        place = f"translate({square.x} {square.y}) scale({square.cell})"
        ground = f'<rect class="sq-unseen" width="{n}" height="{n}"/>'
        return f'<g transform="{place}" shape-rendering="crispEdges">{ground}{layers}{rules}</g>'

    def _repr_svg_(self) -> str:
        return self.svg()


def cells_path(rows: Sequence[str]) -> str:
    """The "1" characters of the rows as an SVG path, in cells: one rectangle for each run of them."""
    return "".join(
        f"M{match.start()} {row}h{match.end() - match.start()}v1h-{match.end() - match.start()}z"
        for row, text in enumerate(rows)
        for match in re.finditer("1+", text)
    )


def _axes(square: Square, side: int, length: int) -> list[Words]:
    """Title, names of the axes, first and last position."""
    x, y, last = square.x, square.y, str(length - 1)
    words = [
        Words(x + side // 2, y - 6, "key j →", "quiet", "middle"),
        Words(x, y - 6, "0", "quiet"),
        Words(x + side, y - 6, last, "quiet", "end"),
        Words(x - 14, y + side // 2, "query i →", "quiet", "middle", turned=True),
        Words(x - 6, y + 10, "0", "quiet", "end"),
        Words(x - 6, y + side, last, "quiet", "end"),
    ]
    return [Words(x, y - TOP - 8, square.panel.title, "text"), *words] if square.panel.title else words


def _fitted(text: str, width: int, indent: int) -> str:
    """The text, its end cut off where the drawing is too narrow for it."""
    room = int((width - 2 * MARGIN - LEFT - indent) / _CODE_WIDTH)
    return text if len(text) <= room else f"{text[: room - 1]}…"


def _text(words: Words) -> str:
    place = f'transform="translate({words.x} {words.y}) rotate(90)"' if words.turned else f'x="{words.x}" y="{words.y}"'
    anchor = "" if words.anchor == "start" else f' text-anchor="{words.anchor}"'
    font = "sq-code" if words.code else "sq-sans"
    return f'<text class="sq-{words.ink} {font}" {place}{anchor}>{html.escape(words.text, quote=False)}</text>'


def _styles(scheme: Scheme, layers: int) -> str:
    fonts = f".sq-sans{{font:11px {_SANS}}}.sq-code{{font:11px {_CODE}}}"
    if scheme != "auto":
        return fonts + _colors(scheme == "dark", layers)
    return f"{fonts}{_colors(False, layers)}@media (prefers-color-scheme:dark){{{_colors(True, layers)}}}"


def _colors(dark: bool, layers: int) -> str:
    fills = {name: pair[dark] for name, pair in PAPER.items()} | {str(k): HUES[k][dark] for k in range(layers)}
    rule = f".sq-rule{{stroke:{PAPER['page'][dark]}}}"
    return "".join(f".sq-{name}{{fill:{color}}}" for name, color in fills.items()) + rule
