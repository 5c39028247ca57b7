"""The bubble chart as a still picture for a README: PNG or SVG, in a light and a dark form, from the same records.

It draws the `BubbleChart` of the page with matplotlib's Agg canvas and needs no display. The background is transparent,
so that the picture sits on any page of its scheme.
"""

import textwrap
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from subquad.records import units
from subquad.records.comparison import Comparison
from subquad.records.store import Records
from subquad.report.bubbles import WIDE, BubbleChart, Point, bubble_chart
from subquad.report.charts import SPEED_TICKS
from subquad.report.palette import BAND_OPACITY, FILL_OPACITY, MUTED, NEUTRAL, Ink, inks

Scheme = Literal["light", "dark"]
PIXELS_PER_INCH = 100
LONGEST_TITLE = 80
"""Characters that fit beside each other."""
RULE = {"light": "#dfe3e8", "dark": "#333b46"}
CAPTION = (
    "Speed of forward + backward relative to dense fused attention\n"
    "area: bytes kept for backward; bars: ± one standard error; dashed: Pareto front of score and speed"
)
FORMATS = (".png", ".svg")


def write_bubble_picture(records: Records, comparison: Comparison, path: Path, *, scheme: Scheme = "light") -> Path:
    """Write the bubble chart of `comparison` to `path` (.png or .svg) and return it.

    Args:
        records: where the comparison is from; they fix the colours, which are those of the page.
        comparison: one of `comparisons(records)`.
        path: the file to write; its folder must exist.
        scheme: for a light or a dark page.

    Raises:
        ValueError: the file name ends otherwise, or no entry has both a score and a measured speed.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"expected a file name that ends with .png or .svg, got {path.name!r}")
    chart = bubble_chart(comparison)
    if not chart.points:
        raise ValueError("no entry has both a score and a measured speed; run `subquad profile` first")
    figure = Figure(figsize=(9.6, 5.4), dpi=PIXELS_PER_INCH)
    FigureCanvasAgg(figure)
    margins = (0.075, 0.15, WIDE.width / 960, WIDE.height / 540)
    axes = figure.add_axes(margins)
    _draw(axes, chart, inks(records), scheme)
    title = textwrap.shorten(comparison.task.title, LONGEST_TITLE, placeholder=" …")
    color, muted = _pick(NEUTRAL, scheme), _pick(MUTED, scheme)
    axes.set_title(title, loc="left", color=color, fontsize=12, fontweight="bold", pad=25, parse_math=False)
    facts = f"{units.count(chart.length)} tokens, {comparison.preset} preset, {comparison.protocol.hardware}"
    note = axes.annotate(facts, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", color=muted)
    note.set(fontsize=10, parse_math=False)
    figure.savefig(path, transparent=True, dpi=2 * PIXELS_PER_INCH)
    return path


def _pick(colors: tuple[str, str], scheme: Scheme) -> str:
    return colors[scheme == "dark"]


def _draw(axes: Axes, chart: BubbleChart, chosen: dict[str, Ink], scheme: Scheme) -> None:
    muted = _pick(MUTED, scheme)
    _dress(axes, chart, scheme)
    axes.axvline(1, color=muted, linewidth=1, linestyle=":", zorder=1)
    if chart.guess is not None:
        height = chart.kind.scale * chart.guess
        axes.axhline(height, color=muted, linewidth=1, linestyle=":", zorder=1)
        text, place = f"{chart.guess_label} {chart.kind.write(chart.guess)}", (chart.speed_range[1], height)
        offset = (-4, 3)
        axes.annotate(text, place, offset, textcoords="offset points", color=muted, fontsize=9, ha="right")
    xs, ys = [x for x, _ in chart.front], [chart.kind.scale * y for _, y in chart.front]
    axes.plot(xs, ys, color=muted, linewidth=1.3, linestyle="--", zorder=2)
    for point in chart.points:
        ink = chosen[point.entry.mixer_key]
        color = ink.dark if scheme == "dark" else ink.light
        _bubble(axes, point, chart.kind.scale, color=color, text=_pick(NEUTRAL, scheme))


def _dress(axes: Axes, chart: BubbleChart, scheme: Scheme) -> None:
    ticks = [tick for tick in SPEED_TICKS if chart.speed_range[0] <= tick <= chart.speed_range[1]]
    axes.set_xscale("log")
    axes.set_xlim(*chart.speed_range)
    axes.set_ylim(*(chart.kind.scale * bound for bound in chart.score_range))
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}×" for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    muted, rule = _pick(MUTED, scheme), RULE[scheme]
    axes.grid(color=rule, linewidth=0.8, zorder=0)
    axes.tick_params(colors=muted, labelsize=10)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(rule)
    axes.set_xlabel(CAPTION, color=muted, fontsize=10)
    axes.set_ylabel(chart.kind.label("Test"), color=muted, fontsize=10)


def _bubble(axes: Axes, point: Point, scale: float, *, color: str, text: str) -> None:
    x, y, error = point.speed.relative, scale * point.summary.mean, scale * point.summary.standard_error
    points_per_pixel = 72 / PIXELS_PER_INCH
    opacity = FILL_OPACITY if point.on_front else BAND_OPACITY
    area = (point.diameter * points_per_pixel) ** 2
    axes.scatter([x], [y], s=area, color=(color, opacity), edgecolors=color, linewidths=1.4, zorder=3)
    axes.errorbar([x], [y], yerr=[error], color=color, capsize=2.5, linewidth=1.3, zorder=4)
    shift = points_per_pixel * point.label_offset[0], points_per_pixel * point.label_offset[1]
    for line, side, weight in zip(point.lines, ("bottom", "top"), ("bold", "normal"), strict=True):
        note = axes.annotate(line, (x, y), shift, textcoords="offset points", ha="center", va=side, color=text)
        note.set(fontsize=9.5, fontweight=weight, parse_math=False)
