"""The page as Chromium shows it: what is drawn is what was recorded, in both schemes and on a narrow screen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page
from synthetic_results import BUCKETS, LENGTHS, SPECS, accuracy
from test_report_page import HOSTILE, hostile_records

from subquad.records.queries import comparisons
from subquad.records.store import Records
from subquad.report.page import render, write_report
from subquad.report.tables import COLUMNS, cells, rows_of

pytestmark = pytest.mark.browser
OpenPage = Callable[..., Page]


def traces(page: Page, heading: str) -> list[dict[str, Any]]:
    script = """heading => {
      const figure = [...document.querySelectorAll("figure")].find(f => f.querySelector("h3").textContent === heading);
      return figure.querySelector(".plot").data.map(({name, x, y, mode, visible, marker}) =>
        ({name, x: [...x], y: [...y], mode, visible, color: marker?.color}));
    }"""
    return page.evaluate(script, heading)


def test_the_bubbles_are_the_records(report: Path, records: Records, open_page: OpenPage) -> None:
    drawn = {t["name"]: t for t in traces(open_page(report), "Accuracy, speed and memory") if t["mode"] == "markers"}
    (comparison,) = comparisons(records)
    expected = {e.label: e for e in comparison.entries if e.best is not None and e.speed is not None}
    assert set(drawn) == set(expected) == {"full", "local", "linear", "performer", "linformer"}
    for label, entry in expected.items():
        assert entry.best is not None
        assert entry.speed is not None
        assert drawn[label]["x"] == [pytest.approx(entry.speed.relative)]
        assert drawn[label]["y"] == [pytest.approx(100 * entry.best.mean)]
    assert drawn["local"]["y"] == [pytest.approx(50 * sum(accuracy(SPECS[1], seed) for seed in (0, 1)))]


def test_the_scaling_curves_are_the_records(report: Path, open_page: OpenPage) -> None:
    page = open_page(report)
    drawn = {t["name"]: t for t in traces(page, "Time of one layer") if t["mode"] == "lines+markers"}
    assert set(drawn) == {"full", "local", "linear", "performer", "linformer"}
    for spec in SPECS:
        if spec.name in drawn:
            assert drawn[spec.name]["x"] == list(LENGTHS)
            assert drawn[spec.name]["y"] == [pytest.approx(spec.milliseconds(length)) for length in LENGTHS]


def test_the_table_shows_the_same_text_as_the_rows(report: Path, records: Records, open_page: OpenPage) -> None:
    page = open_page(report)
    for index, row in enumerate(rows_of(*comparisons(records))):
        shown = page.locator(".results tbody tr").nth(index)
        text = cells(row)
        assert shown.locator(".name").inner_text().removesuffix(" ◆") == row.label
        for column, _ in COLUMNS[1:]:
            if row.has_figures or column in ("status", "parameters", "steps"):
                assert shown.locator(f'[data-column="{column}"]').inner_text() == text[column]


def test_both_schemes_repaint_the_charts(report: Path, tmp_path: Path, open_page: OpenPage) -> None:
    colors = {}
    for scheme in ("light", "dark"):
        page = open_page(report, scheme=scheme)
        background = page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
        font = page.evaluate("document.querySelector('.plot').layout.font.color")
        colors[scheme] = (background, font)
        page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
    assert colors["light"] == ("rgb(255, 255, 255)", "rgb(29, 33, 41)")
    assert colors["dark"] == ("rgb(26, 30, 37)", "rgb(230, 233, 238)")
    page.click("#theme")
    page.wait_for_function("document.querySelector('.plot').layout.font.color === 'rgb(29, 33, 41)'")


def test_a_narrow_screen_never_scrolls_sideways(report: Path, tmp_path: Path, open_page: OpenPage) -> None:
    page = open_page(report, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("(box => box.scrollWidth > box.clientWidth)(document.querySelector('.scroll'))")
    page.screenshot(path=tmp_path / "narrow.png", full_page=True)


BOXES = """heading => {
  const figure = [...document.querySelectorAll("figure")].find(f => f.querySelector("h3").textContent === heading);
  const sides = ({left, right, top, bottom}) => ({left, right, top, bottom});
  const box = element => sides(element.getBoundingClientRect());
  const notes = [...figure.querySelectorAll(".annotation-text")].map(n => ({text: n.textContent, ...box(n)}));
  return {figure: box(figure), plot: box(figure.querySelector(".plot .main-svg")), notes,
    axes: box(figure.querySelector(".plot .bglayer ~ .draglayer .nsewdrag"))};
}"""


@pytest.mark.parametrize("width", [1240, 400, 320])
def test_the_bubbles_and_their_names_fit_the_screen(width: int, report: Path, open_page: OpenPage) -> None:
    boxes = open_page(report, width=width).evaluate(BOXES, "Accuracy, speed and memory")
    assert boxes["plot"]["right"] <= boxes["figure"]["right"] + 1 <= width
    assert len(boxes["notes"]) == 6
    for note in boxes["notes"]:
        assert boxes["plot"]["left"] <= note["left"] < note["right"] <= boxes["plot"]["right"]


def test_a_window_that_becomes_narrow_gets_the_narrow_chart(report: Path, open_page: OpenPage) -> None:
    page = open_page(report)
    title = "document.querySelector('.plot').layout.xaxis.title.text"
    assert "<br>" not in page.evaluate(title)
    page.set_viewport_size({"width": 400, "height": 900})
    page.wait_for_function(f"{title}.includes('<br>')")
    boxes = page.evaluate(BOXES, "Accuracy, speed and memory")
    assert boxes["plot"]["right"] <= 400


@pytest.mark.parametrize("heading", ["Accuracy, speed and memory", "Validation accuracy"])
def test_the_guess_is_named_where_no_curve_can_lie(heading: str, report: Path, open_page: OpenPage) -> None:
    boxes = open_page(report).evaluate(BOXES, heading)
    (guess,) = [note for note in boxes["notes"] if "majority class 17.3 %" in note["text"]]
    assert guess["bottom"] <= boxes["axes"]["top"]
    assert guess["top"] >= boxes["plot"]["top"]


def test_a_chip_hides_its_mechanism_in_every_chart(report: Path, open_page: OpenPage) -> None:
    page = open_page(report)
    page.locator(".chip", has_text="local").first.click()
    page.wait_for_function("document.querySelector('.plot').data.some(trace => trace.visible === false)")
    for heading in ("Accuracy, speed and memory", "Time of one layer", "Training loss"):
        assert {t["visible"] for t in traces(page, heading) if t["name"] == "local"} == {False}
        assert {t["visible"] for t in traces(page, heading) if t["name"] == "full"} == {True}


def test_a_heading_sorts_its_table(report: Path, open_page: OpenPage) -> None:
    page = open_page(report)
    page.locator('th[data-sort="parameters"] button').click()
    assert page.locator(".results tbody tr .name").first.inner_text().startswith("linformer")
    page.locator('th[data-sort="parameters"] button').click()
    assert page.locator(".results tbody tr .name").first.inner_text().startswith("majority class")


def test_hostile_text_is_shown_and_not_run(tmp_path: Path, open_page: OpenPage) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(hostile_records()), encoding="utf-8")
    page = open_page(path, width=390)
    assert HOSTILE in str(page.locator(".results tbody").text_content())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    labels = page.locator(".annotation-text").all_text_contents()
    assert any("<script>alert(1)</script>" in label for label in labels)


def test_a_page_of_bits_draws_its_positions_and_fits_a_narrow_screen(bits_results: Path, open_page: OpenPage) -> None:
    page = open_page(write_report(bits_results), width=390, scheme="dark")
    drawn = {trace["name"]: trace for trace in traces(page, "Test bits per byte by position in the stream")}
    assert set(drawn) == {"full", "local", "linear", "performer", "linformer", "aft"}
    assert len(drawn["full"]["x"]) == len(BUCKETS)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator('th[data-sort="best"] button').first.click()
    assert page.locator(".results tbody tr .name").first.inner_text().startswith("unigram")
