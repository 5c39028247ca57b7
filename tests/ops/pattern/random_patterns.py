"""Random compositions of patterns, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

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


def atoms(length: int) -> st.SearchStrategy[Pattern]:
    """Every constructor, with sizes around those of blocks and strips."""
    few, some, position = st.integers(0, 5), st.integers(0, 90), st.integers(0, length - 1)
    size = st.integers(1, 70)
    columns = st.tuples(st.integers(1, 20), st.integers(0, 19), st.integers(0, 19)).map(
        lambda drawn: Columns(drawn[0] + drawn[1] + drawn[2], drawn[0], drawn[1])
    )
    exclude = st.sampled_from([None, BlockWindow(5, 1, 1), Window(20, 3) | Sink(2)])
    documents = st.lists(st.integers(0, 4), min_size=length, max_size=length)
    return st.one_of(
        st.builds(Causal),
        st.builds(Window, some, some),
        st.builds(Dilated, few, few, st.integers(1, 7)),
        st.builds(Global, st.lists(position, min_size=1, max_size=3), rows=st.booleans()),
        st.builds(Global, position, cols=st.just(False)),
        st.builds(Strided, st.integers(1, 9)),
        st.builds(Block, size),
        columns,
        st.builds(BlockWindow, size, st.integers(0, 2), st.integers(0, 2)),
        st.builds(Random, size, st.integers(0, 3), st.integers(0, 99), exclude),
        st.builds(Log),
        st.builds(Ngram, st.integers(1, 9)),
        st.builds(Sink, few),
        st.builds(lambda ids: Documents(sorted(ids)), documents),
        st.builds(Documents, documents),
    )


def compositions(length: int) -> st.SearchStrategy[Pattern]:
    """Unions, intersections, complements and patterns by head of these, half of them causal."""
    composed = st.recursive(
        atoms(length),
        lambda inner: st.one_of(
            st.builds(Pattern.__or__, inner, inner),
            st.builds(Pattern.__and__, inner, inner),
            st.builds(Pattern.__invert__, inner),
            st.builds(Pattern.shift, inner, st.integers(0, 9)),
            st.builds(lambda base, head, own: base.heads({head: own}), inner, st.integers(0, 1), inner),
        ),
        max_leaves=5,
    )
    return st.one_of(composed, composed.map(lambda pattern: Causal() & pattern))
