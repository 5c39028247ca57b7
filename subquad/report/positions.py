"""The score against the position: what a mechanism gains from the tokens before.

A position is the number of tokens before it: in the context or, where a run reads the windows of a document as a
stream, in the document since its first window. All mechanisms stand at the same positions there, whether they carry a
memory of earlier windows or see each window alone.

Runs keep the test score in buckets of positions that double; a point is a bucket, drawn at its geometric middle, the
mean over the seeds.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from subquad.records import units
from subquad.records.comparison import Comparison, Entry
from subquad.records.metrics import MetricKind
from subquad.report.charts import Figure, axis, layout
from subquad.report.html import plot_text
from subquad.report.palette import Ink

LEAST_PLACES = 3


@dataclass(frozen=True)
class Place:
    """A bucket of positions `first` to `last`, with the mean of the scores there."""

    first: int
    last: int
    score: float

    @property
    def text(self) -> str:
        """The positions: "8 to 15", "1"."""
        first, last = units.count(self.first), units.count(self.last)
        return first if first == last else f"{first} to {last}"


def places_of(entry: Entry) -> tuple[Place, ...]:
    """The buckets of an entry, scores averaged over its seeds; none where positions were not told apart."""
    runs = [run.metric.by_position for run in entry.finished if run.metric is not None]
    if entry.red_probes or not runs:
        return ()
    return tuple(
        Place(buckets[0].first, buckets[0].last, statistics.fmean(bucket.value for bucket in buckets))
        for buckets in zip(*runs, strict=True)
    )


def positions_of(comparison: Comparison) -> str:
    """What positions are those of: "context" or "stream"."""
    return "stream" if comparison.is_stream else "context"


def has_places(comparison: Comparison) -> bool:
    """Whether there is a curve to draw: with fewer than three buckets there is none."""
    return any(len(places_of(entry)) >= LEAST_PLACES for entry in comparison.entries)


def position_curves(comparison: Comparison, inks: dict[str, Ink]) -> Figure:
    """Return the test score against the number of tokens before (log), one line a mechanism."""
    drawn = [(entry, places) for entry in comparison.entries if (places := places_of(entry))]
    bounds = sorted({place.first for _, places in drawn for place in places})
    before = "tokens of the document before" if comparison.is_stream else "tokens read before"
    x = axis(f"Position in the {positions_of(comparison)} ({before})") | {"type": "log", "minor": {"ticks": ""}}
    x |= {"tickvals": bounds, "ticktext": [units.count(bound) for bound in bounds]}
    traces = [_trace(entry, places, comparison.kind, inks[entry.mixer_key]) for entry, places in drawn]
    return {"data": traces, "layout": layout(x, axis(comparison.kind.label("Test")), height=360)}


def _trace(entry: Entry, places: Sequence[Place], kind: MetricKind, ink: Ink) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plot_text(entry.label),
        "meta": {"mixer": entry.mixer_key},
        "x": [math.sqrt(place.first * place.last) for place in places],
        "y": [kind.scale * place.score for place in places],
        "line": {"color": ink.color, "width": 1.8},
        "marker": {"size": 6, "symbol": ink.marker, "color": ink.color},
        "hoverinfo": "text",
        "hovertext": [
            f"<b>{plot_text(entry.label)}</b><br>{place.text} tokens before: {kind.write(place.score)}"
            for place in places
        ],
    }


def position_note(comparison: Comparison) -> str:
    """Each mechanism with the fewest and the most tokens before, in one sentence; "" where there is nothing to say."""
    kind = comparison.kind
    found = [(entry.label, places) for entry in comparison.entries if (places := places_of(entry))]
    if not found:
        return ""
    first, last = found[0][1][0].text, found[0][1][-1].text
    ends = [f"{label} {kind.number(p[0].score)} → {kind.number(p[-1].score)}" for label, p in found]
    of_what = "tokens of the document before" if comparison.is_stream else "tokens of context"
    return f"Test {kind.title} with {first} → {last} {of_what}, in {kind.unit}: {', '.join(ends)}."
