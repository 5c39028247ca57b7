"""The drawing of who attends whom: what stands where, and the text of its SVG."""

from __future__ import annotations

import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from subquad.drawing import HUES, PAPER, Drawing, Layer, Panel, cells_path

NEAR = Layer("Window(1, 0)", ("1000", "1100", "0110", "0011"))
FAR = Layer("Strided(3) & 'x'", ("0000", "0000", "0000", "1000"))
ONE = Drawing((Panel("", (NEAR, FAR)),), "within <Causal>")
TWO = Drawing((Panel("head 0", (NEAR,)), Panel("head 1", (FAR, NEAR))))


def elements(drawing: Drawing, tag: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(drawing.svg()).findall(f".//{{http://www.w3.org/2000/svg}}{tag}")


def test_runs_of_cells_are_rectangles_of_one_path() -> None:
    assert cells_path(("0110", "0000", "1001")) == "M1 0h2v1h-2zM0 2h1v1h-1zM3 2h1v1h-1z"


def test_the_svg_is_well_formed_and_says_what_it_shows() -> None:
    assert [each.text for each in elements(ONE, "text")] == [
        *("key j →", "0", "3", "query i →", "0", "3"),
        *("Window(1, 0)", "Strided(3) & 'x'", "within <Causal>"),
    ]
    (title,) = elements(ONE, "title")
    assert title.text == "Who attends whom: Window(1, 0); Strided(3) & 'x'; within <Causal>"


def test_the_same_drawing_gives_the_same_text() -> None:
    assert ONE.svg() == Drawing((Panel("", (NEAR, FAR)),), "within <Causal>").svg() == ONE._repr_svg_()


def test_queries_go_downwards_and_keys_to_the_right() -> None:
    square = TWO.sheet().squares[0]
    (down,) = [words for words in TWO.sheet().words if words.turned and words.x < square.x]
    assert (down.text, down.y) == ("query i →", square.y + 2 * square.cell)
    first, last = [words for words in TWO.sheet().words if words.anchor == "end" and words.x < square.x]
    assert (first.text, last.text) == ("0", "3")
    assert first.y < last.y == square.y + 4 * square.cell


def test_panels_stand_side_by_side_inside_the_sheet() -> None:
    sheet = TWO.sheet()
    left, right = sheet.squares
    side = 4 * left.cell
    assert left.y == right.y
    assert left.x + side < right.x
    assert right.x + side < sheet.width
    assert all(0 <= words.x <= sheet.width and 0 <= words.y <= sheet.height for words in sheet.words)


def test_a_label_has_the_same_colour_in_every_panel() -> None:
    groups = elements(TWO, "g")
    paths = [[path.get("class") for path in group if "sq-rule" not in str(path.get("class"))] for group in groups]
    assert paths == [["sq-unseen", "sq-0"], ["sq-unseen", "sq-0", "sq-1"]]
    assert [swatch.hue for swatch in TWO.sheet().swatches] == [0, 1]


def test_the_first_layer_is_drawn_last_so_that_it_shows() -> None:
    (group,) = elements(ONE, "g")
    assert [path.get("class") for path in group][1:3] == ["sq-1", "sq-0"]


def test_colours_begin_anew_when_they_are_used_up() -> None:
    layers = tuple(Layer(f"Sink({k})", ("1",)) for k in range(len(HUES) + 1))
    drawing = Drawing((Panel("", layers),))
    assert drawing.hue(f"Sink({len(HUES)})") == 0
    assert f".sq-{len(HUES)}" not in drawing.svg()


def test_a_file_follows_the_scheme_of_its_reader_unless_told_otherwise() -> None:
    light, dark = (PAPER["page"][k] for k in (0, 1))
    assert re.search(f"{light}.*@media \\(prefers-color-scheme:dark\\){{.*{dark}", ONE.svg())
    assert light in ONE.svg("light")
    assert dark not in ONE.svg("light")
    assert dark in ONE.svg("dark")
    assert "@media" not in ONE.svg("light") + ONE.svg("dark")


@pytest.mark.parametrize(("length", "ruled"), [(60, True), (61, False)])
def test_cells_are_ruled_off_while_they_are_wide_enough(length: int, ruled: bool) -> None:
    drawing = Drawing((Panel("", (Layer("Sink(0)", ("0" * length,) * length),)),))
    assert ('class="sq-rule"' in drawing.svg()) == ruled


def test_a_label_that_is_too_long_for_the_picture_is_cut_off() -> None:
    long = Drawing((Panel("", (Layer("Documents((0, " + "1, " * 99 + "))", ("1",)),)),))
    (shown,) = [words.text for words in long.sheet().words if words.code]
    assert shown.startswith("Documents((0, 1, ")
    assert shown.endswith("…")
    assert len(shown) < 40


def test_drawing_needs_nothing_but_the_standard_library() -> None:
    program = "import sys, subquad.drawing; print(*({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"
