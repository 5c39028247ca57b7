from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from synthetic_results import SPECS, accuracy, run

from subquad.records.queries import comparisons
from subquad.records.store import Records
from subquad.report.bubbles import bubble_chart
from subquad.report.labels import Bubble, place
from subquad.report.palette import DENSE_INK, inks
from subquad.report.still_picture import write_bubble_picture
from subquad.report.tables import COLUMNS, cells, rows_of


def test_rows_hold_the_figures_of_the_records(records: Records) -> None:
    rows = {row.label: row for row in rows_of(*comparisons(records))}
    assert next(iter(rows)) == "full"
    assert list(rows)[-2:] == ["reformer", "majority class"]
    for spec in SPECS:
        row = rows[spec.name]
        seeds = {"reformer": 0, "linformer": 1}.get(spec.name, 2)
        assert (row.best.values if row.best else ()) == tuple(accuracy(spec, seed) for seed in range(seeds))
        assert row.parameters == spec.parameters
    local = rows["local"]
    assert local.step_seconds == pytest.approx(0.0115, rel=1e-3)
    assert local.relative_speed == pytest.approx(22 / 11.5, rel=0.01)
    assert local.saved_bytes == pytest.approx(3.4e6, rel=1e-6)
    assert rows["linformer"].unequal_parameters
    assert not rows["reformer"].unequal_parameters
    assert rows["aft"].relative_speed is None


def test_cells_write_each_column_for_a_reader(records: Records) -> None:
    text = {row.label: cells(row) for row in rows_of(*comparisons(records))}
    assert all(list(cell) and set(cell) == {name for name, _ in COLUMNS} for cell in text.values())
    assert text["local"]["best"] == "40.1 ± 0.9 %"
    assert text["local"]["step_time"] == "11.5 ms"
    assert text["linformer"]["parameters"] == "162,250 *"
    assert text["linformer"]["status"] == "1 of 2 ok"
    assert text["reformer"]["best"] == "–"
    assert text["reformer"]["status"] == "red probe"
    assert text["majority class"]["best"] == "17.3 ± 0.8 %"


def test_training_memory_without_a_peak_is_a_lower_bound() -> None:
    records = Records(runs=(run(SPECS[0], 0).model_copy(update={"peak_bytes": None}),))
    assert cells(rows_of(*comparisons(records))[0])["memory"] == "≥ 52.4 MB"


def test_the_pareto_front_holds_no_beaten_and_no_broken_row(records: Records) -> None:
    assert {row.label for row in rows_of(*comparisons(records)) if row.on_pareto_front} == {"full", "local", "linear"}


def test_each_mechanism_has_its_own_colour_and_full_is_neutral(records: Records) -> None:
    chosen = inks(records)
    assert len({ink.light for ink in chosen.values()}) == len(chosen)
    assert DENSE_INK in chosen.values()


def test_what_is_not_drawn_is_named_with_its_reason(records: Records) -> None:
    (comparison,) = comparisons(records)
    missing = {entry.name: reason for entry, reason in bubble_chart(comparison).missing}
    assert missing == {
        "aft": "its speed was not profiled on this machine",
        "reformer": "red probe: leak (y[12] saw x[40])",
    }


@given(st.lists(st.tuples(st.floats(0, 800), st.floats(0, 400), st.floats(4, 32)), max_size=6))
def test_a_label_never_covers_its_own_bubble(places: list[tuple[float, float, float]]) -> None:
    bubbles = [Bubble(x, y, radius, 8, ("mechanism", "1.00 MB")) for x, y, radius in places]
    for bubble, (dx, dy) in zip(bubbles, place(bubbles, (), 860, 400), strict=True):
        width, height = bubble.label_size
        nearest = max(abs(dx) - width / 2, 0), max(abs(dy) - height / 2, 0)
        assert nearest[0] ** 2 + nearest[1] ** 2 >= bubble.radius**2 - 1e-6


@pytest.mark.parametrize("name", ["bubbles.png", "bubbles.svg"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_still_picture_is_drawn(records: Records, tmp_path: Path, name: str, scheme: str) -> None:
    (comparison,) = comparisons(records)
    path = write_bubble_picture(records, comparison, tmp_path / name, scheme="dark" if scheme == "dark" else "light")
    if path.suffix == ".png":
        with Image.open(path) as image:
            assert image.size == (1920, 1080)
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20
    else:
        assert "</svg>" in path.read_text()


def test_nothing_is_cut_off_at_the_edges_of_a_still_picture(records: Records, tmp_path: Path) -> None:
    (comparison,) = comparisons(records)
    task = comparison.task.model_copy(update={"title": "a title without end " * 20})
    path = write_bubble_picture(records, replace(comparison, task=task), tmp_path / "bubbles.png")
    with Image.open(path) as image:
        box = image.getchannel("A").getbbox()
        assert box is not None
        assert min(box[0], box[1], image.width - box[2], image.height - box[3]) > 0


def test_a_still_picture_of_nothing_or_of_another_format_is_refused(records: Records, tmp_path: Path) -> None:
    (comparison,) = comparisons(records)
    with pytest.raises(ValueError, match=r"expected a file name that ends with \.png or \.svg, got 'a\.pdf'"):
        write_bubble_picture(records, comparison, tmp_path / "a.pdf")
    bare = Records(runs=records.runs)
    with pytest.raises(ValueError, match="no entry has both a score and a measured speed"):
        write_bubble_picture(bare, comparisons(bare)[0], tmp_path / "a.png")
