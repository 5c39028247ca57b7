import pytest
from hypothesis import given
from hypothesis import strategies as st

import subquad.patterns
from subquad.patterns import (
    Block,
    BlockWindow,
    Causal,
    Columns,
    Dilated,
    Documents,
    Global,
    Log,
    Ngram,
    Pattern,
    Random,
    Sink,
    Strided,
    Window,
)
from subquad.patterns.expression import CONSTRUCTORS, LARGEST, LONGEST, parse_pattern, write_pattern

sizes = st.integers(1, 9)
counts = st.integers(0, 9)
leaves: st.SearchStrategy[Pattern] = st.one_of(
    st.just(Causal()),
    st.just(Log()),
    st.builds(Window, counts, counts),
    st.builds(Dilated, counts, counts, sizes),
    st.builds(Strided, sizes),
    st.builds(Ngram, sizes),
    st.builds(Block, sizes),
    st.builds(BlockWindow, sizes, counts, counts),
    st.builds(Sink, counts),
    st.builds(lambda count, offset: Columns(count + offset + 2, count, offset), sizes, counts),
    st.builds(Global, st.lists(counts), st.booleans(), st.just(True)),
    st.builds(Documents, st.lists(counts)),
)


def composed(inner: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
    return st.one_of(
        st.builds(lambda p, q: p | q, inner, inner),
        st.builds(lambda p, q: p & q, inner, inner),
        st.builds(lambda p: ~p, inner),
        st.builds(lambda p, n: p.shift(n), inner, counts),
        st.builds(lambda p, own: p.heads(own), inner, st.dictionaries(counts, inner, min_size=1, max_size=2)),
        st.builds(Random, sizes, counts, counts, st.none() | inner),
    )


@given(st.recursive(leaves, composed, max_leaves=6))
def test_a_pattern_reads_back_as_it_was_written(pattern: Pattern) -> None:
    assert parse_pattern(write_pattern(pattern)) == pattern


def test_operators_bind_as_in_python() -> None:
    a, b, c = Causal(), Window(7, 0), Strided(8)
    assert parse_pattern("Causal() & (Window(7, 0) | Strided(8))") == a & (b | c)
    assert parse_pattern("Causal() & Window(7, 0) | Strided(8)") == (a & b) | c
    assert parse_pattern(" ~Causal()\n & Window(left=7, right=0) ") == ~a & b


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (Causal() & (Window(7, 0) | Strided(8)), "Causal() & (Window(7, 0) | Strided(8))"),
        (Columns(8, 2), "Columns(8, 2)"),
        (Columns(8, 2, 3), "Columns(8, 2, offset=3)"),
        (Global([3, 1], rows=False), "Global((1, 3), rows=False)"),
        (Random(4, 2, 0, exclude=Sink(1) | Log()), "Random(4, 2, 0, exclude=Sink(1) | Log())"),
        (~(Causal() & Log()), "~(Causal() & Log())"),
        ((Causal() | Sink(2)).heads({1: Log()}).shift(3), "(Causal() | Sink(2)).heads({1: Log()}).shift(3)"),
    ],
)
def test_a_pattern_is_written_without_its_defaults(pattern: Pattern, text: str) -> None:
    assert write_pattern(pattern) == text


def test_every_constructor_of_the_package_can_be_read() -> None:
    classes = {each for each in vars(subquad.patterns).values() if isinstance(each, type) and issubclass(each, Pattern)}
    assert set(CONSTRUCTORS.values()) == classes - {Pattern}
    assert all(name == constructor.__name__ for name, constructor in CONSTRUCTORS.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Causal() & Windw(7, 0)",
            "'Windw(7, 0)' at character 12 of the pattern: there is no such pattern; did you mean",
        ),
        ("Causal", "'Causal' at character 1 of the pattern: Causal needs parentheses"),
        (
            "Causal() & Window(7)",
            "'Window(7)' at character 12 of the pattern: Window doesn't take these arguments; it is ",
        ),
        ("Window(7)", "it is Window(left, right)"),
        ("Columns(8, 2, 0, 0)", "it is Columns(stride, count, offset=0)"),
        ("Sink(1) | Strided(0)", "'Strided(0)' at character 11 of the pattern: Strided: stride must be"),
        ("Random(4, 1)", "it is Random(size, count, seed, exclude=None)"),
        ("Sink('a')", "\"'a'\" at character 6 of the pattern: expected an integer"),
        ("Sink(2.5)", "'2.5' at character 6 of the pattern: expected an integer"),
        (f"Sink({LARGEST + 1})", f"no number here may be larger than {LARGEST}"),
        ("Causal() and Log()", "patterns are joined by | and &"),
        ("Causal() + Log()", "'Causal() + Log()' at character 1 of the pattern: expected a pattern, such as Causal()"),
        ("Causal() & 3", "'3' at character 12 of the pattern: expected a pattern"),
        ("Causal() &", "can't be read: invalid syntax at character 11 of 'Causal() &'"),
        ("Causal() & (Log()", "'(' was never closed at character 12"),
        ("", "can't be read: invalid syntax at character 1 of ''; expected one such as Causal()"),
        ("Causal().dense(8)", "a pattern has the methods .heads and .shift here, not .dense"),
        ("Causal().heads({'a': Log()})", "expected the number of a head before each colon"),
        ("Causal().heads(**{})", "arguments are written out, without **"),
        (
            "__import__('os').system('true')",
            "\"__import__('os')\" at character 1 of the pattern: there is no such pattern",
        ),
        ("(lambda: Causal())()", "expected a pattern"),
        ("[Causal() for _ in (1,)][0]", "expected a pattern"),
        ("Causal() if 1 else Log()", "expected a pattern"),
        ("Sink(len((1, 2)))", "'len((1, 2))' at character 6 of the pattern: there is no such pattern"),
        ("Causal.__class__()", "Causal needs parentheses"),
        ("Sink(1)" + " | Sink(1)" * 400, f"a pattern has at most {LONGEST} characters"),
        ("~" * 3000 + "Causal()", "nested too deeply"),
    ],
)
def test_what_is_no_pattern_says_where_and_what_is(text: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the text is compared below
        parse_pattern(text)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        *("Window((1, 2), 0)", "Window(None, 0)", "Strided(Causal())", "Sink(True)", "Sink(-1)", "Random(4, 1, 0, 5)"),
        *("Documents(None)", "Documents(((0, 1), 2))", "Global(Causal())", "Global(None)", "Global((0, True))"),
        *("Causal().heads(3)", "Causal().heads({-1: Log()})", "Causal().shift(Log())", "Causal().shift(-1)"),
    ],
)
def test_arguments_of_another_kind_are_refused_with_their_place(text: str) -> None:
    with pytest.raises(ValueError, match=r"at character \d+ of the pattern: "):
        parse_pattern(text)
