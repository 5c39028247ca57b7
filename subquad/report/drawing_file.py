"""A drawing of who attends whom as a file: SVG, which is text, or PNG, drawn from the same layout with matplotlib."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from subquad.drawing import HUES, PAPER, SMALLEST_RULED, Drawing, Scheme, Square, Words

FORMATS = (".png", ".svg")
PIXELS_PER_INCH = 100
SHARPNESS = 2
"""Pixels of a PNG for each pixel of the layout."""
FONT_POINTS = 11 * 72 / PIXELS_PER_INCH


def check_drawing_path(path: Path) -> None:
    """Check that a drawing can be written to a file of this name.

    Raises:
        ValueError: the name ends otherwise.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"expected a file name that ends with .png or .svg, got {path.name!r}")


def write_drawing(drawing: Drawing, path: Path, scheme: Scheme = "auto") -> None:
    """Write a drawing.

    Args:
        drawing: what to write.
        path: ends with .png or .svg; its folder must exist.
        scheme: of the colours; a PNG can't follow its reader and is light where that is asked for.

    Raises:
        ValueError: the name ends otherwise.
    """
    check_drawing_path(path)
    if path.suffix.lower() == ".svg":
        path.write_text(drawing.svg(scheme), encoding="utf-8")
    else:
        _write_png(drawing, path, dark=scheme == "dark")


def _write_png(drawing: Drawing, path: Path, *, dark: bool) -> None:
    sheet = drawing.sheet()
    figure = Figure(figsize=(sheet.width / PIXELS_PER_INCH, sheet.height / PIXELS_PER_INCH))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for square in sheet.squares:
        _draw_square(axes, drawing, square, dark=dark)
    for swatch in sheet.swatches:
        color = HUES[swatch.hue][dark]
        axes.fill_between((swatch.x, swatch.x + 11), swatch.y, swatch.y + 11, color=color, linewidth=0)
    for words in sheet.words:
        _write_words(axes, words, dark=dark)
    axes.set_xlim(0, sheet.width)
    axes.set_ylim(sheet.height, 0)
    figure.savefig(path, dpi=SHARPNESS * PIXELS_PER_INCH, facecolor=PAPER["page"][dark])


def _draw_square(axes: Axes, drawing: Drawing, square: Square, *, dark: bool) -> None:
    unseen = to_rgb(PAPER["unseen"][dark])
    cells = [[unseen] * drawing.length for _ in range(drawing.length)]
    for layer in reversed(square.panel.layers):
        color = to_rgb(HUES[drawing.hue(layer.label)][dark])
        for cell_row, row in zip(cells, layer.rows, strict=True):
            for column, seen in enumerate(row):
                if seen == "1":
                    cell_row[column] = color
    side = square.cell * drawing.length
    left, right, top, bottom = square.x, square.x + side, square.y, square.y + side
    axes.imshow(cells, extent=(left, right, bottom, top), interpolation="nearest", aspect="auto")
    if square.cell >= SMALLEST_RULED:
        steps = range(square.cell, side, square.cell)
        rule = {"color": PAPER["page"][dark], "linewidth": 72 / PIXELS_PER_INCH}
        axes.vlines([left + step for step in steps], top, bottom, **rule)
        axes.hlines([top + step for step in steps], left, right, **rule)


def _write_words(axes: Axes, words: Words, *, dark: bool) -> None:
    text = axes.text(words.x, words.y, words.text, color=PAPER[words.ink][dark], fontsize=FONT_POINTS)
    text.set(family="monospace" if words.code else "sans-serif", parse_math=False)
    text.set(ha={"start": "left", "middle": "center", "end": "right"}[words.anchor], va="baseline")
    if words.turned:  # placed by the middle of its box, which lies right of the baseline
        text.set(x=words.x + 4, ha="center", va="center", rotation=270)
