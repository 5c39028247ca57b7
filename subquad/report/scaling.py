"""Time, memory and analytic cost against length, with the lengths from which a mechanism beats dense attention.

Profiles are only comparable where hardware, width, heads, batch, dtype and causality agree; each such group is a
`Setting` with its own figures. Where `full` itself was not profiled, the dense measurements that every profile carries
stand for it.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from subquad.records import units
from subquad.records.conventions import DENSE
from subquad.records.measures import speed_at
from subquad.records.queries import mixer_key, mixer_labels, red_probes
from subquad.records.schema import ProfilePoint, ProfileRecord, Status, Timing
from subquad.records.store import Records
from subquad.report.charts import Figure, axis, layout
from subquad.report.html import plot_text
from subquad.report.palette import DENSE_INK, Ink

DENSE_LABEL = "full (dense fused)"


@dataclass(frozen=True, order=True)
class Setting:
    """What must agree for two profiles to stand in one chart."""

    hardware: str
    causal: bool
    embed_dim: int
    num_heads: int
    batch_size: int
    dtype: str

    @property
    def text(self) -> str:
        """The setting in words."""
        direction = "causal" if self.causal else "bidirectional"
        heads = f"{self.num_heads} head{'s' if self.num_heads > 1 else ''}"
        return f"{direction}, width {self.embed_dim}, {heads}, batch {self.batch_size}, {self.dtype}"


@dataclass(frozen=True)
class Line:
    """One mechanism in a setting; `refused` says why it has no figures, "" where it has."""

    key: str
    label: str
    profile: ProfileRecord
    refused: str


def settings(records: Records) -> dict[Setting, tuple[Line, ...]]:
    """Return the profiles by setting, dense attention first, then by label."""
    labels = mixer_labels(records)
    red = {key: "red probe: " + "; ".join(texts) for key, texts in red_probes(records).items()}
    groups: dict[Setting, list[Line]] = defaultdict(list)
    for p in records.profiles:
        setting = Setting(p.environment.hardware, p.causal, p.embed_dim, p.num_heads, p.batch_size, p.dtype)
        failed = "" if p.status is Status.OK else f"{p.status.value}: {p.message}"
        key = mixer_key(p.mixer)
        groups[setting].append(Line(key, labels[key], p, red.get(key, "") or failed))
    return {
        setting: tuple(sorted(lines, key=lambda line: (line.profile.mixer_name != DENSE, line.label)))
        for setting, lines in sorted(groups.items(), key=lambda item: item[0])
    }


def drawn(lines: Sequence[Line]) -> list[Line]:
    """Return the lines that have figures."""
    return [line for line in lines if not line.refused and line.profile.points]


def time_figure(lines: Sequence[Line], inks: dict[str, Ink]) -> Figure:
    """Return median forward + backward (ms) against length, interquartile bands, crossovers as crosses."""
    shown = drawn(lines)
    traces: list[Figure] = []
    if shown and all(line.profile.mixer_name != DENSE for line in shown):
        traces += _time_traces(shown[0], lambda p: p.dense_forward_backward, DENSE_INK, DENSE_LABEL)
    for line in shown:
        traces += _time_traces(line, lambda p: p.forward_backward, inks[line.key], line.label)
    traces += [cross for line in shown for cross in _crossings(line, inks[line.key])]
    return _figure(traces, "Forward + backward (ms)")


def memory_figure(lines: Sequence[Line], inks: dict[str, Ink]) -> Figure:
    """Return the bytes kept for backward (MB) against length; dotted, where measured: peak memory."""
    traces = _plain_traces(lines, inks, lambda p: p.saved_bytes / 1e6, lambda p: p.dense_saved_bytes / 1e6, "MB")
    for line in drawn(lines):
        peaks = [(p.length, p.peak_bytes / 1e6) for p in line.profile.points if p.peak_bytes]
        if peaks:
            traces.append(_trace(line.key, f"{line.label}, peak", peaks, inks[line.key], "MB") | {"mode": "lines"})
            traces[-1]["line"] |= {"dash": "dot", "width": 1.2}
    return _figure(traces, "Memory of one step (MB)")


def flops_figure(lines: Sequence[Line], inks: dict[str, Ink]) -> Figure:
    """Return the analytic forward cost (GFLOP per sequence) against length."""
    traces = _plain_traces(lines, inks, lambda p: p.cost.flops / 1e9, lambda p: p.dense_cost.flops / 1e9, "GFLOP")
    return _figure(traces, "Analytic cost, forward (GFLOP)")


def _figure(traces: list[Figure], title: str) -> Figure:
    lengths = sorted({round(x) for trace in traces if trace["mode"] == "lines+markers" for x in trace["x"]})
    x = axis("Length (tokens)") | {
        "type": "log",
        "tickvals": lengths,
        "ticktext": [units.count(length) for length in lengths],
        "minor": {"ticks": ""},
    }
    minor = {"showgrid": False, "ticks": "outside"}
    y = axis(title) | {"type": "log", "dtick": 1, "exponentformat": "none", "minor": minor}
    return {"data": traces, "layout": layout(x, y, height=360)}


def _time_traces(line: Line, timing: Callable[[ProfilePoint], Timing], ink: Ink, label: str) -> list[Figure]:
    points = line.profile.points
    lengths = [point.length for point in points]
    low, high = (
        [1e3 * timing(point).quartiles_seconds[0] for point in points],
        [1e3 * timing(point).quartiles_seconds[1] for point in points],
    )
    band = {
        "type": "scatter",
        "mode": "lines",
        "meta": {"mixer": line.key},
        "x": lengths + lengths[::-1],
        "y": high + low[::-1],
        "fill": "toself",
        "fillcolor": ink.band,
        "line": {"width": 0, "color": ink.color},
        "hoverinfo": "skip",
    }
    places = [(point.length, 1e3 * timing(point).median_seconds) for point in points]
    trace = _trace(line.key, label, places, ink, "ms")
    trace["hovertext"] = [
        f"{text}, interquartile range {units.seconds(timing(point).interquartile_seconds)}"
        for text, point in zip(trace["hovertext"], points, strict=True)
    ]
    return [band, trace]


def _trace(key: str, label: str, places: Sequence[tuple[int, float]], ink: Ink, unit: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plot_text(label),
        "meta": {"mixer": key},
        "x": [length for length, _ in places],
        "y": [value for _, value in places],
        "line": {"color": ink.color, "width": 2.6 if ink is DENSE_INK else 1.8},
        "marker": {"size": 6.5, "symbol": ink.marker, "color": ink.color},
        "hoverinfo": "text",
        "hovertext": [
            f"<b>{plot_text(label)}</b><br>{units.count(length)} tokens: {value:,.3g} {unit}"
            for length, value in places
        ],
    }


def _plain_traces(
    lines: Sequence[Line],
    inks: dict[str, Ink],
    figure: Callable[[ProfilePoint], float],
    dense: Callable[[ProfilePoint], float],
    unit: str,
) -> list[Figure]:
    shown = drawn(lines)
    traces = [_trace(line.key, line.label, _positive(line.profile, figure), inks[line.key], unit) for line in shown]
    if shown and all(line.profile.mixer_name != DENSE for line in shown):
        traces.insert(0, _trace(DENSE, DENSE_LABEL, _positive(shown[0].profile, dense), DENSE_INK, unit))
    return traces


def _positive(profile: ProfileRecord, figure: Callable[[ProfilePoint], float]) -> list[tuple[int, float]]:
    return [(point.length, figure(point)) for point in profile.points if figure(point) > 0]


def _crossings(line: Line, ink: Ink) -> list[Figure]:
    length = line.profile.crossover_length
    if length is None or length <= line.profile.points[0].length or line.profile.mixer_name == DENSE:
        return []
    speed = speed_at(line.profile, length)
    if speed is None:
        return []
    text = f"<b>{plot_text(line.label)}</b> is faster than dense attention from about {units.count(length)} tokens on"
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "crossover",
            "meta": {"mixer": line.key},
            "x": [length],
            "y": [1e3 * speed.seconds],
            "marker": {"symbol": "x-thin", "size": 13, "line": {"width": 2.6, "color": ink.color}},
            "hoverinfo": "text",
            "hovertext": [text],
        }
    ]
