"""The charts of a comparison as plotly figures: bubbles and learning curves.

Figures are plain dictionaries; colours are CSS variables, which the page resolves for light or dark. Each trace carries
the key of its mixer in `meta`, by which the page hides and shows a mechanism everywhere at once. All text goes through
`plot_text`.
"""

import math
from typing import Any

from subquad.records import units
from subquad.records.comparison import Comparison, Entry
from subquad.records.metrics import MetricKind
from subquad.records.schema import RunRecord, Status
from subquad.report.bubbles import BubbleChart, Point
from subquad.report.html import plot_text
from subquad.report.palette import Ink

Figure = dict[str, Any]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
SPEED_TICKS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32, 64)


def axis(title: str) -> Figure:
    """Return an axis with a title and the page's colours; what is particular to it is joined with `|`."""
    return {
        "title": {"text": title, "standoff": 10, "font": {"size": 13, "color": "var(--muted)"}},
        "gridcolor": "var(--rule)",
        "linecolor": "var(--rule-strong)",
        "tickcolor": "var(--rule-strong)",
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "automargin": True,
    }


def layout(xaxis: Figure, yaxis: Figure, *, height: int) -> Figure:
    """Return a layout without legend or title: the page's own chips and headings serve for these."""
    return {
        "xaxis": xaxis,
        "yaxis": yaxis,
        "height": height,
        "margin": {"l": 62, "r": 16, "t": 28, "b": 52},
        "showlegend": False,
        "hovermode": "closest",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12.5, "color": "var(--text)"},
        "hoverlabel": {
            "align": "left",
            "bgcolor": "var(--surface-raised)",
            "bordercolor": "var(--rule-strong)",
            "font": {"family": FONT, "size": 12.5, "color": "var(--text)"},
        },
    }


def bubble_figure(chart: BubbleChart, inks: dict[str, Ink], *, narrow: bool = False) -> Figure:
    """Return the score (y) against speed relative to dense fused attention (x, log), area: bytes kept.

    A `narrow` chart says the same of its axis on three lines.
    """
    scale = chart.kind.scale
    traces: list[Figure] = []
    if len(chart.front) > 1:
        traces.append(_front_trace(chart))
    traces += [_bubble_trace(point, chart.kind, inks[point.entry.mixer_key]) for point in chart.points]
    parts = ("Speed of forward + backward", f"at {units.count(chart.length)} tokens,", "relative to dense")
    title = ("<br>" if narrow else " ").join(parts) + " fused attention (×)"
    ticks = [tick for tick in SPEED_TICKS if chart.speed_range[0] <= tick <= chart.speed_range[1]]
    x = axis(title) | {"type": "log", "range": [math.log10(bound) for bound in chart.speed_range]}
    x |= {"tickvals": ticks, "ticktext": [_tick(tick) for tick in ticks]}
    y = axis(chart.kind.label("Test")) | {"range": [scale * bound for bound in chart.score_range]}
    shapes = [_rule(x0=1, x1=1, y0=0, y1=1, yref="paper")]
    annotations = [_label(point, scale) for point in chart.points]
    if chart.guess is not None:
        shapes.append(_level(scale * chart.guess))
        annotations.append(_guess_note(chart.guess_label, chart.guess, chart.kind))
    return {"data": traces, "layout": layout(x, y, height=484) | {"shapes": shapes, "annotations": annotations}}


def _tick(value: float) -> str:
    return f"{value:g}×" if value >= 1 else f"1/{round(1 / value)}×"


def _rule(**place: Any) -> Figure:
    return {"type": "line", "layer": "below", "line": {"color": "var(--muted)", "width": 1, "dash": "dot"}, **place}


def _level(height: float) -> Figure:
    return _rule(x0=0, x1=1, xref="paper", y0=height, y1=height)


def _guess_note(label: str, value: float, kind: MetricKind) -> Figure:
    """What the dotted level is, above the axes, where no curve and no bubble can lie under it."""
    text = plot_text(f"····· {label} {kind.write(value)}")
    font = {"size": 11.5, "color": "var(--muted)"}
    place = {"x": 0, "xref": "paper", "xanchor": "left", "y": 1, "yref": "paper", "yanchor": "bottom"}
    return {"text": text, "showarrow": False, "font": font, **place}


def _front_trace(chart: BubbleChart) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [speed for speed, _ in chart.front],
        "y": [chart.kind.scale * score for _, score in chart.front],
        "line": {"color": "var(--muted)", "width": 1.5, "dash": "dash"},
        "hoverinfo": "skip",
    }


def _bubble_trace(point: Point, kind: MetricKind, ink: Ink) -> Figure:
    entry, summary, speed = point.entry, point.summary, point.speed
    lines = [
        f"<b>{plot_text(entry.label)}</b>",
        kind.on_test(summary.mean, summary.standard_error),
        f"{_seeds(len(summary.values))}, {units.count(entry.runs[0].parameters)} parameters",
        f"forward + backward {units.seconds(speed.seconds)}, dense {units.seconds(speed.dense_seconds)}",
        f"kept for backward {units.size(speed.saved_bytes)}, dense {units.size(speed.dense_saved_bytes)}",
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plot_text(entry.label),
        "meta": {"mixer": entry.mixer_key, "row": entry.key},
        "x": [speed.relative],
        "y": [kind.scale * summary.mean],
        "error_y": {
            "type": "data",
            "array": [kind.scale * summary.standard_error],
            "color": ink.color,
            "thickness": 1.6,
        },
        "marker": {
            "size": [point.diameter],
            "color": ink.fill if point.on_front else ink.band,
            "opacity": 1,
            "line": {"color": ink.color, "width": 2 if point.on_front else 1},
        },
        "hoverinfo": "text",
        "hovertext": ["<br>".join(lines)],
    }


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _label(point: Point, scale: float) -> Figure:
    name, size = (plot_text(line) for line in point.lines)
    return {
        "name": point.entry.mixer_key,
        "text": f"<b>{name}</b><br>{size}",
        "x": math.log10(point.speed.relative),
        "y": scale * point.summary.mean,
        "xshift": point.label_offset[0],
        "yshift": point.label_offset[1],
        "showarrow": False,
        "font": {"size": 12},
    }


def score_curves(comparison: Comparison, inks: dict[str, Ink]) -> Figure:
    """Return the validation score against steps, one line a seed, with the guess without a model."""
    traces: list[Figure] = []
    kind = comparison.kind
    for entry, run in _drawn(comparison):
        places = [(p.step, kind.scale * p.validation) for p in run.curve if p.validation is not None]
        if places:
            steps, scores = [step for step, _ in places], [score for _, score in places]
            traces.append(_curve(entry, run, steps, scores, inks, kind.unit))
    shapes, notes = [], []
    if comparison.guess_score is not None:
        shapes = [_level(kind.scale * comparison.guess_score)]
        notes = [_guess_note(comparison.guess_label, comparison.guess_score, kind)]
    x, y = axis("Training step") | {"rangemode": "tozero"}, axis(kind.label("Validation"))
    return {"data": traces, "layout": layout(x, y, height=340) | {"shapes": shapes, "annotations": notes}}


def loss_curves(comparison: Comparison, inks: dict[str, Ink]) -> Figure:
    """Return training loss against steps, one line a seed; a run that diverged ends in a cross."""
    traces: list[Figure] = []
    for entry, run in _drawn(comparison):
        places = [(p.step, p.train_loss) for p in run.curve if p.train_loss is not None]
        if places:
            steps, losses = [step for step, _ in places], [loss for _, loss in places]
            traces.append(_curve(entry, run, steps, losses, inks, ""))
            if run.status is not Status.OK:
                traces.append(_cross(entry, run, steps[-1], losses[-1], inks))
    x, y = axis("Training step") | {"rangemode": "tozero"}, axis("Training loss (nats)")
    return {"data": traces, "layout": layout(x, y, height=340)}


def _drawn(comparison: Comparison) -> list[tuple[Entry, RunRecord]]:
    return [(entry, run) for entry in comparison.entries if not entry.red_probes for run in entry.runs]


def _curve(
    entry: Entry, run: RunRecord, steps: list[int], values: list[float], inks: dict[str, Ink], unit: str
) -> Figure:
    ink = inks[entry.mixer_key]
    hover = [
        f"<b>{plot_text(entry.label)}</b> seed {run.seed}<br>step {units.count(step)}: {value:.4g} {unit}"
        for step, value in zip(steps, values, strict=True)
    ]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plot_text(entry.label),
        "meta": {"mixer": entry.mixer_key},
        "x": steps,
        "y": values,
        "line": {"color": ink.color, "width": 1.8},
        "marker": {"size": 5, "symbol": ink.marker, "maxdisplayed": 12},
        "opacity": 1 if run is entry.runs[0] else 0.55,
        "hoverinfo": "text",
        "hovertext": hover,
    }


def _cross(entry: Entry, run: RunRecord, step: int, loss: float, inks: dict[str, Ink]) -> Figure:
    marker = {"symbol": "x", "size": 12, "color": inks[entry.mixer_key].color}
    text = f"<b>{plot_text(entry.label)}</b> seed {run.seed}: {run.status.value} after step {units.count(step)}"
    meta = {"mixer": entry.mixer_key}
    common = {"type": "scatter", "mode": "markers", "name": plot_text(entry.label), "meta": meta}
    return {**common, "x": [step], "y": [loss], "marker": marker, "hoverinfo": "text", "hovertext": [text]}
