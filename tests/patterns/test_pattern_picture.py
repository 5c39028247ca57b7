import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad.drawing import Drawing
from subquad.patterns import (
    Block,
    BlockWindow,
    Causal,
    Columns,
    Documents,
    Global,
    Log,
    Pattern,
    Random,
    Sink,
    Strided,
    Window,
)
from subquad.patterns.picture import draw_pattern, picture_length

SPARSE_TRANSFORMER = Causal() & (Window(7, 0) | Strided(8))


def cells(drawing: Drawing, panel: int = 0) -> list[list[bool]]:
    layers = drawing.panels[panel].layers
    return [["1" in cell for cell in zip(*rows, strict=True)] for rows in zip(*(la.rows for la in layers), strict=True)]


patterns: st.SearchStrategy[Pattern] = st.recursive(
    st.sampled_from([Causal(), Log(), Window(3, 1), Strided(3), Block(4), Columns(4, 2), Sink(2), Random(2, 1, 0)]),
    lambda inner: st.one_of(
        st.builds(lambda p, q: p | q, inner, inner),
        st.builds(lambda p, q: p & q, inner, inner),
        st.builds(lambda p: ~p, inner),
    ),
    max_leaves=5,
)


@given(patterns, st.integers(1, 20))
def test_the_filled_cells_are_the_definition(pattern: Pattern, length: int) -> None:
    assert cells(draw_pattern(pattern, length)) == pattern.dense(length).tolist()


@given(patterns, st.integers(1, 20))
def test_no_cell_has_two_colours(pattern: Pattern, length: int) -> None:
    layers = draw_pattern(pattern, length).panels[0].layers
    for rows in zip(*(layer.rows for layer in layers), strict=True):
        assert all(cell.count("1") <= 1 for cell in zip(*rows, strict=True))


def test_each_part_of_a_union_has_its_colour_and_the_first_wins() -> None:
    drawing = draw_pattern(SPARSE_TRANSFORMER, 20)
    window, stride = drawing.panels[0].layers
    assert (window.label, stride.label, drawing.note) == ("Window(7, 0)", "Strided(8)", "within Causal()")
    assert window.rows[17] == "0" * 10 + "1" * 8 + "00"
    assert stride.rows[17] == "01" + "0" * 7 + "1" + "0" * 10


def test_what_is_no_union_is_one_layer() -> None:
    drawing = draw_pattern(Causal() & Window(3, 3))
    assert drawing.labels == ("Causal() & Window(3, 3)",)
    assert drawing.note == ""


def test_heads_stand_side_by_side_as_the_definition_has_them() -> None:
    pattern = (Causal() & (Block(4) | Columns(4, 1))).heads({1: Causal() & (Block(4) | Columns(4, 1, offset=1))})
    drawing = draw_pattern(pattern, 12)
    assert [panel.title for panel in drawing.panels] == ["head 0", "head 1"]
    assert [cells(drawing, head) for head in (0, 1)] == pattern.dense(12).tolist()
    assert drawing.labels == ("Block(4)", "Columns(4, 1)", "Columns(4, 1, offset=1)")
    assert drawing.note == "within Causal()"


def test_a_condition_that_not_all_heads_share_is_not_stated_of_all() -> None:
    drawing = draw_pattern(SPARSE_TRANSFORMER.heads({1: Window(1, 1) | Sink(1)}), 8)
    assert drawing.note == ""


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        (Causal(), 48),
        (SPARSE_TRANSFORMER, 48),
        (Causal() & (Window(99, 0) | Strided(100)), 400),
        (Causal() & (Window(999, 0) | Strided(1000)), 512),
        (~Block(32).heads({2: BlockWindow(16, 1, 1)}), 128),
        (Random(16, 1, 0), 64),
        (Columns(64, 8), 256),
        (Sink(20), 80),
        (Global((0, 99)).shift(1), 100),
        (Causal() & Documents((0, 0, 1, 1, 1)), 5),
    ],
)
def test_there_are_as_many_tokens_as_show_the_structure(pattern: Pattern, length: int) -> None:
    assert picture_length(pattern) == length


@pytest.mark.parametrize("length", [0, 513])
def test_a_picture_has_1_to_512_tokens(length: int) -> None:
    with pytest.raises(ValueError, match=f"a picture of who attends whom has 1 to 512 tokens, got {length}"):
        draw_pattern(Causal(), length)


def test_positions_that_the_picture_does_not_have_are_told_of() -> None:
    with pytest.raises(ValueError, match="index 4000 lies past the end of a sequence of 512 tokens"):
        draw_pattern(Global(4000))
