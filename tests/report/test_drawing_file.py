from pathlib import Path

import pytest
from PIL import Image, ImageColor

from subquad.drawing import HUES, PAPER, Drawing, Layer, Panel, Scheme
from subquad.records.mechanisms import Picture
from subquad.report.drawing_file import SHARPNESS, write_drawing
from subquad.report.pictures import mechanism_drawing

NEAR = Layer("Window(1, 0)", ("1000", "1100", "0110", "0011"))
FAR = Layer("Strided(3)", ("1000", "0100", "0010", "1001"))
DRAWING = Drawing((Panel("head 0", (NEAR, FAR)), Panel("head 1", (FAR,))))


@pytest.mark.parametrize(("scheme", "dark"), [("auto", False), ("light", False), ("dark", True)])
def test_every_cell_of_a_png_has_the_colour_of_its_layer(scheme: Scheme, dark: bool, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    write_drawing(DRAWING, path, scheme)
    image = Image.open(path).convert("RGB")
    sheet = DRAWING.sheet()
    assert image.size == (SHARPNESS * sheet.width, SHARPNESS * sheet.height)
    near, far, unseen = (ImageColor.getrgb(pair[dark]) for pair in (HUES[0], HUES[1], PAPER["unseen"]))
    expected = (
        [
            [near if n == "1" else far if f == "1" else unseen for n, f in zip(*rows, strict=True)]
            for rows in zip(NEAR.rows, FAR.rows, strict=True)
        ],
        [[far if f == "1" else unseen for f in row] for row in FAR.rows],
    )
    for square, colors in zip(sheet.squares, expected, strict=True):
        middles = [SHARPNESS * (square.cell * k + square.cell // 2) for k in range(4)]
        x, y = SHARPNESS * square.x, SHARPNESS * square.y
        assert [[image.getpixel((x + right, y + down)) for right in middles] for down in middles] == colors
    assert image.getpixel((2, 2)) == ImageColor.getrgb(PAPER["page"][dark])


def test_an_svg_file_is_the_text_of_the_drawing(tmp_path: Path) -> None:
    path = tmp_path / "picture.SVG"
    write_drawing(DRAWING, path, "dark")
    assert path.read_text(encoding="utf-8") == DRAWING.svg("dark")


def test_other_formats_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a file name that ends with \.png or \.svg, got 'picture\.pdf'"):
        write_drawing(DRAWING, tmp_path / "picture.pdf")
    assert list(tmp_path.iterdir()) == []


def test_both_forms_of_a_mechanism_stand_side_by_side_with_the_sizes_they_were_drawn_with() -> None:
    pictures = {"bidirectional": Picture(length=4, rows=FAR.rows), "causal": Picture(length=4, rows=NEAR.rows)}
    drawing = mechanism_drawing("local", pictures, {"window": 5, "block": 4})
    assert [(panel.title, panel.layers[0].rows) for panel in drawing.panels] == [
        ("bidirectional", FAR.rows),
        ("causal", NEAR.rows),
    ]
    assert drawing.note == "local, window=5, block=4"
    assert drawing.sheet().swatches == ()


def test_a_mechanism_without_a_picture_says_so() -> None:
    with pytest.raises(ValueError, match="mine: it has no form without a context, hence no picture"):
        mechanism_drawing("mine", {}, {})
