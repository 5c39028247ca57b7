"""What the report makes of a metric that is better when lower: directions, units, the guess and positions."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from plotly.graph_objects import Figure
from synthetic_results import BUCKETS, SPECS, bits

from subquad.records.comparison import Comparison, Entry
from subquad.records.measures import Summary
from subquad.records.metrics import metric_kind
from subquad.records.queries import comparisons
from subquad.records.store import Records, read_all
from subquad.report.bubbles import bubble_chart
from subquad.report.charts import bubble_figure, score_curves
from subquad.report.page import render
from subquad.report.palette import GUESS_INK, inks
from subquad.report.pictures import seed_dots
from subquad.report.positions import position_curves, position_note, positions_of
from subquad.report.still_picture import write_bubble_picture
from subquad.report.tables import cells, column_titles, rows_of, stream_note


@pytest.fixture(scope="module")
def records(bits_results: Path) -> Records:
    return read_all(bits_results)


@pytest.fixture(scope="module")
def comparison(records: Records) -> Comparison:
    return comparisons(records)[0]


def test_bits_in_a_column_named_after_them_need_no_unit(comparison: Comparison) -> None:
    text = {row.label: cells(row) for row in rows_of(comparison)}
    assert text["unigram"]["best"] == "4.710 ± 0.011"
    assert re.fullmatch(r"\d\.\d{3} ± \d\.\d{3}", text["full"]["best"])
    assert column_titles(comparison.kind)["best"] == "Test bits per byte, best validation"


def test_the_front_holds_the_fewest_bits(comparison: Comparison) -> None:
    assert {row.label for row in rows_of(comparison) if row.on_pareto_front} == {"full", "local", "linear"}
    chart = bubble_chart(comparison)
    assert list(chart.front) == sorted(chart.front)
    scores = [score for _, score in chart.front]
    assert scores == sorted(scores)  # faster costs more bits


def test_charts_name_metric_unit_and_guess(comparison: Comparison, records: Records) -> None:
    chosen = inks(records)
    bubbles, curves = bubble_figure(bubble_chart(comparison), chosen), score_curves(comparison, chosen)
    for figure, split in ((bubbles, "Test"), (curves, "Validation")):
        Figure(figure)
        assert figure["layout"]["yaxis"]["title"]["text"] == f"{split} bits per byte"
    assert "····· unigram 4.710 bits/byte" in [note["text"] for note in curves["layout"]["annotations"]]
    assert GUESS_INK in chosen.values()


def test_a_guess_far_off_does_not_push_the_mechanisms_together(comparison: Comparison, results: Path) -> None:
    far, (near,) = bubble_chart(comparison), (bubble_chart(c) for c in comparisons(read_all(results)))
    assert far.guess is None
    assert far.score_range[1] < 4
    assert near.guess == 0.1735
    assert near.score_range[0] < 0.1735


def test_the_score_is_drawn_against_the_context(comparison: Comparison, records: Records) -> None:
    figure = position_curves(comparison, inks(records))
    Figure(figure)
    traces = {trace["name"]: trace for trace in figure["data"]}
    assert set(traces) == {"full", "local", "linear", "performer", "linformer", "aft"}
    seeds = [bits(SPECS[0], seed) for seed in (0, 1)]
    expected = [sum(seeds) / 2 + 2 / last for _, last in BUCKETS]
    assert traces["full"]["y"] == pytest.approx(expected)
    assert "8 to 15 tokens before: " in traces["full"]["hovertext"][3]
    title = "Position in the stream (tokens of the document before)"
    assert (figure["layout"]["xaxis"]["title"]["text"], positions_of(comparison)) == (title, "stream")
    assert position_note(comparison).startswith(
        "Test bits per byte with 1 → 512 to 999 tokens of the document before, in bits/byte: full "
    )


def test_positions_of_windows_that_stand_alone_are_those_of_the_context(
    comparison: Comparison, records: Records
) -> None:
    def alone(entry: Entry) -> Entry:
        return replace(entry, runs=tuple(run.model_copy(update={"carries_state": None}) for run in entry.runs))

    entries = tuple(alone(entry) for entry in comparison.entries)
    found = replace(comparison, entries=entries)
    figure = position_curves(found, inks(records))
    title = "Position in the context (tokens read before)"
    assert (figure["layout"]["xaxis"]["title"]["text"], positions_of(found)) == (title, "context")
    assert position_note(found).startswith("Test bits per byte with 1 → 512 to 999 tokens of context, in bits/byte: ")


def test_the_page_says_which_way_is_better_and_who_carried_state(records: Records) -> None:
    page = render(records)
    for text in (
        "Scores (lower is better)",
        "Down is better, right is faster",
        "Test bits per byte by position in the stream",
        "Positions count through all windows of a document",
        "Bits per byte, speed and memory",
        "257 token ids",
        "carrying state from one to the next: linear; seeing each alone: full, ",
    ):
        assert text in page


def test_nothing_is_said_of_streams_or_positions_where_there_are_none(results: Path) -> None:
    (comparison,) = comparisons(read_all(results))
    assert stream_note(comparison) == ""
    assert position_note(comparison) == ""
    assert "by position" not in render(read_all(results))


def test_the_better_seeds_stand_on_the_right() -> None:
    def place(kind: str, value: float, scale: tuple[float, float]) -> float:
        dots = seed_dots(Summary((value,), (0.1,)), scale, metric_kind(kind), "red")
        return float(re.findall(r'cx="([0-9.]+)"', dots)[0])

    assert place("accuracy", 0.7, (0.6, 0.8)) < place("accuracy", 0.75, (0.6, 0.8))
    assert place("bits_per_byte", 1.7, (1.9, 1.5)) < place("bits_per_byte", 1.6, (1.9, 1.5))


def test_the_still_picture_is_drawn(records: Records, comparison: Comparison, tmp_path: Path) -> None:
    path = write_bubble_picture(records, comparison, tmp_path / "bits.svg")
    assert "</svg>" in path.read_text()
