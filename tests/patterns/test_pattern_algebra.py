"""The pattern algebra against plain Python, pair by pair: constructors, compositions, tiles, terms, bounds."""

from __future__ import annotations

import numpy as np
import plain_predicates as plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
    Tile,
    Window,
)
from subquad.patterns.terms import UNBOUNDED, Term

LENGTHS = st.integers(1, 19)
BEYOND = 6
"""Queries may reach further than keys: a cached decoder asks for them."""


def cases(length: int) -> st.SearchStrategy[tuple[plain.Case, int]]:
    return st.tuples(plain.compositions(length), st.just(length))


def evaluate(terms: list[Term], queries: int, keys: int) -> Tensor:
    """The union of the terms, by their definition."""
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    union = torch.zeros(queries, keys, dtype=torch.bool)
    for low, high, modulus, filters in terms:
        seen = ((i - j) >= low) & ((i - j) <= high) & ((i - j) % modulus == 0)
        for part in filters:
            seen = seen & part.visible(i, j)
        union |= seen
    return union


@pytest.mark.parametrize(
    "case",
    [
        plain.Case(Causal(), lambda i, j: j <= i),
        plain.window(3, 0),
        plain.window(0, 2),
        plain.window(2, 40),
        plain.dilated(2, 1, 3),
        plain.strided(4),
        plain.ngram(1),
        plain.ngram(2),
        plain.ngram(5),
        plain.log(),
        plain.block(4),
        plain.block_window(3, 1, 2),
        plain.columns(5, 2, 0),
        plain.columns(5, 2, 3),
        plain.sink(0),
        plain.sink(3),
        plain.chosen({0, 4}, True, True),
        plain.chosen({0, 4}, False, True),
        plain.chosen({2}, True, False),
        plain.documents([5, 5, -1, -1, -2, 5, *[7] * 12]),
        plain.random_blocks(4, 2, 3, Block(4), 18),
    ],
    ids=lambda case: str(case.pattern),
)
def test_a_constructor_is_its_predicate_pair_by_pair(case: plain.Case) -> None:
    assert torch.equal(case.pattern.rectangle(18 + BEYOND, 18), plain.matrix(case.sees, 18 + BEYOND, 18))


def test_positional_arguments_keep_their_documented_order() -> None:
    assert Window(3, 1) == Window(left=3, right=1)
    assert Dilated(3, 1, 2) == Dilated(left=3, right=1, dilation=2)
    assert Columns(8, 2, 1) == Columns(stride=8, count=2, offset=1)
    assert BlockWindow(8, 2, 1) == BlockWindow(size=8, left=2, right=1)
    assert Random(8, 2, 1, Causal()) == Random(size=8, count=2, seed=1, exclude=Causal())
    assert Global(2, True, False) == Global(index=2, rows=True, cols=False)


@settings(max_examples=150)
@given(LENGTHS.flatmap(cases))
def test_a_composition_is_the_composition_of_its_predicates(drawn: tuple[plain.Case, int]) -> None:
    (pattern, sees), length = drawn
    assert torch.equal(pattern.rectangle(length + BEYOND, length), plain.matrix(sees, length + BEYOND, length))
    assert torch.equal(pattern.dense(length), plain.matrix(sees, length, length))


@settings(max_examples=150)
@given(LENGTHS.flatmap(cases), st.integers(1, 7), st.integers(1, 7))
def test_tiles_never_claim_what_a_pair_contradicts(drawn: tuple[plain.Case, int], height: int, width: int) -> None:
    (pattern, sees), length = drawn
    queries = length + BEYOND
    visible = plain.matrix(sees, queries, length)
    i0, j0 = np.arange(queries)[:, None], np.arange(length)[None]
    i1, j1 = np.minimum(i0 + height, queries) - 1, np.minimum(j0 + width, length) - 1
    classes = pattern.resolve(length).tiles(i0, i1, j0, j1)
    assert classes.shape == (queries, length)
    for i in range(queries):
        for j in range(length):
            inside = visible[i : i + height, j : j + width]
            assert classes[i, j] != Tile.EMPTY or not inside.any()
            assert classes[i, j] != Tile.FULL or inside.all()


@settings(max_examples=60)
@given(LENGTHS.flatmap(lambda length: st.tuples(plain.leaves(length), st.just(length))))
def test_constructors_are_certain_of_single_pairs(drawn: tuple[plain.Case, int]) -> None:
    (pattern, sees), length = drawn
    i, j = np.arange(length + BEYOND)[:, None], np.arange(length)[None]
    classes = pattern.resolve(length).tiles(i, i, j, j)
    unordered = isinstance(pattern, Documents) and list(pattern.ids) != sorted(pattern.ids)
    if not unordered:
        expected = plain.matrix(sees, length + BEYOND, length).numpy()
        np.testing.assert_array_equal(classes, np.where(expected, Tile.FULL, Tile.EMPTY))


@settings(max_examples=150)
@given(LENGTHS.flatmap(cases))
def test_the_union_of_the_terms_is_the_pattern_and_that_of_the_complement_is_the_rest(
    drawn: tuple[plain.Case, int],
) -> None:
    (pattern, sees), length = drawn
    resolved = pattern.resolve(length)
    visible = plain.matrix(sees, length + BEYOND, length)
    assert torch.equal(evaluate(resolved.terms(), length + BEYOND, length), visible)
    assert torch.equal(evaluate(resolved.complement(), length + BEYOND, length), ~visible)


@settings(max_examples=150)
@given(LENGTHS.flatmap(cases))
def test_every_visible_pair_keeps_the_bounds_of_its_pattern(drawn: tuple[plain.Case, int]) -> None:
    (pattern, sees), length = drawn
    low, high = pattern.offsets()
    for i, j in plain.matrix(sees, length + BEYOND, length).nonzero().tolist():
        assert low <= i - j <= high
        assert not pattern.causal or j <= i


@settings(max_examples=60)
@given(LENGTHS.flatmap(cases))
def test_a_pattern_by_distance_depends_on_nothing_else(drawn: tuple[plain.Case, int]) -> None:
    (pattern, _), length = drawn
    if pattern.by_distance:
        dense = pattern.dense(length)
        assert torch.equal(dense[1:, 1:], dense[:-1, :-1])


@settings(max_examples=60)
@given(LENGTHS.flatmap(lambda length: st.tuples(plain.leaves(length), st.integers(0, 4), st.just(length))))
def test_chosen_keys_and_queries_are_the_pattern(drawn: tuple[plain.Case, int, int]) -> None:
    (pattern, sees), offset, length = drawn
    pattern = pattern.shift(offset)
    visible = plain.matrix(lambda i, j: sees(i + offset, j), length + BEYOND, length)
    keys, queries = pattern.chosen_keys(length), pattern.chosen_queries(length + BEYOND)
    if keys is not None:
        assert torch.equal(visible, torch.isin(torch.arange(length), torch.from_numpy(keys)).expand_as(visible))
    if queries is not None:
        rows = torch.isin(torch.arange(length + BEYOND), torch.from_numpy(queries))
        assert torch.equal(visible, rows[:, None].expand_as(visible))


def test_terms_join_bounds_and_multiples_and_drop_what_contradicts_itself() -> None:
    assert (Strided(4) & Strided(6) & Window(20, 3)).terms() == [Term(-3, 20, 12)]
    assert (Causal() & (Window(7, 2) | Strided(8))).terms() == [Term(0, 7), Term(low=0, modulus=8)]
    assert (~Causal() & Window(5, 0)).terms() == []
    assert (~Block(4) & (Block(4) | Sink(1))).terms() == [Term(filters=(~Block(4), Sink(1)))]
    assert [pattern.terms() for pattern in (Sink(0), Ngram(1), Random(4, 0, 0), Global(()))] == [[], [], [], []]


def test_a_product_of_too_many_terms_stays_whole() -> None:
    pattern = (Window(0, 0) | Strided(2) | Sink(1)) & (Block(2) | Log() | Sink(3)) & (Block(3) | Strided(5))
    assert len(pattern.terms()) == 18
    larger = pattern & (Block(5) | Strided(3) | Sink(4)) & (Block(7) | Dilated(2, 2, 3))
    assert larger.terms() == [Term(filters=(larger,))]
    assert torch.equal(evaluate(larger.terms(), 12, 12), larger.dense(12))


def test_sets_of_keys_and_of_queries_say_so() -> None:
    assert Columns(4, 1).chosen_keys(10).tolist() == [3, 7]
    assert Sink(3).chosen_keys(2).tolist() == [0, 1]
    index = Global((1, 8), rows=False).chosen_keys(5)
    assert index is not None
    assert index.tolist() == [1]
    rows = Global((1, 8), cols=False).shift(3).chosen_queries(10)
    assert rows is not None
    assert rows.tolist() == [5]
    assert Global((1, 8)).chosen_keys(10) is None
    assert Causal().chosen_keys(10) is None
    assert Causal().chosen_queries(10) is None


def test_causality_is_seen_through_compositions() -> None:
    assert (Causal() & (Window(5, 5) | Global(0) | Strided(3))).causal
    assert ((Causal() & Global(0)) | Ngram(4) | Log()).causal
    assert not (Window(5, 0) | Window(0, 1)).causal
    assert (~Window(0, UNBOUNDED)).causal
    assert not Causal().heads({1: Window(0, 1)}).causal
    assert not Causal().shift(1).causal


def test_blocks_of_a_composition_fit_all_parts() -> None:
    assert (Block(6) | BlockWindow(4, 1, 1) | Causal()).block == 2
    assert Causal().block is None
    assert Block(4).shift(8).block == 4
    assert Block(4).shift(3).block is None
    assert BlockWindow(4, 2, 1).reach == (2, 1)
    assert (Block(4) & Causal()).reach is None


def test_equal_patterns_are_equal_and_hash_alike() -> None:
    def build() -> Pattern:
        exclude = BlockWindow(4, 1, 1)
        return (Causal() & (Window(3, 0) | Global([4, 1, 4]))).heads({1: ~Random(4, 2, 7, exclude)}).shift(2)

    assert build() == build()
    assert hash(build()) == hash(build())
    assert len({build(), build(), Causal(), Causal().shift(0), ~~Causal()}) == 2
    assert Global([3, 1]) == Global(torch.tensor([1, 3])) == Global(np.array([3, 1, 1])) == Global((1, 3))
    assert Global(torch.tensor(2)) == Global(2)
    assert Documents(torch.tensor([0, 0, 1])) == Documents([0, 0, 1])
    assert Window(3, 0) != Window(3, 1)
    assert (Window(3, 0) & Causal()) != (Window(3, 0) | Causal())
    assert Random(4, 2, 7).resolve(32) == Random(4, 2, 7)


def test_a_part_named_twice_counts_once() -> None:
    assert Causal() | Causal() == Causal()
    assert (Causal() & Log()) & Causal() == Causal() & Log()
    assert (Block(2) | Log()) | (Log() | Block(2)) == Block(2) | Log()


def test_patterns_cannot_be_changed() -> None:
    for pattern, field in ((Window(1, 0), "left"), (Global(1), "index"), (Causal() | Log(), "parts")):
        with pytest.raises(AttributeError, match="cannot assign"):
            setattr(pattern, field, 3)


def test_only_patterns_join_patterns() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = Causal() & True  # pyright: ignore[reportOperatorIssue] - what is refused
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = Causal() | 3  # pyright: ignore[reportOperatorIssue] - what is refused


def test_heads_get_their_own_pattern_and_the_others_the_common_one() -> None:
    pattern = Causal().heads({2: Block(3), 0: ~Causal()})
    dense = pattern.dense(7)
    assert pattern.num_heads == 3
    for head, own in enumerate((~Causal(), Causal(), Block(3))):
        assert torch.equal(dense[head], own.dense(7))
    assert pattern.of_head(9) == Causal()
    assert Causal().heads({}) == Causal()


def test_operators_act_on_every_head() -> None:
    by_head = Window(2, 2).heads({1: Block(4)})
    for composed, expected in (
        (by_head & Causal(), (Window(2, 2) & Causal(), Block(4) & Causal())),
        (by_head | Sink(1), (Window(2, 2) | Sink(1), Block(4) | Sink(1))),
        (~by_head, (~Window(2, 2), ~Block(4))),
        (by_head.shift(3), (Window(2, 2).shift(3), Block(4).shift(3))),
        (by_head.heads({0: Log()}), (Log(), Block(4))),
    ):
        assert torch.equal(composed.dense(9), torch.stack([pattern.dense(9) for pattern in expected]))
        i, j = np.arange(0, 9, 3)[:, None], np.arange(0, 9, 3)[None]
        classes = composed.tiles(i, i + 2, j, j + 2)
        for head in range(2):
            own = composed.of_head(head).dense(9).unfold(0, 3, 3).unfold(1, 3, 3).flatten(2)
            assert not ((classes == Tile.EMPTY) & own.any(-1).numpy()).any()
            assert not ((classes == Tile.FULL) & ~own.all(-1).numpy()).any()


def test_a_shift_moves_queries_and_adds_up() -> None:
    pattern = Causal() & (Window(3, 0) | Strided(4) | Global(1))
    whole = pattern.rectangle(12, 12)
    assert torch.equal(pattern.shift(5).rectangle(7, 12), whole[5:])
    assert pattern.shift(2).shift(3) == pattern.shift(5)
    assert Columns(4, 1).shift(3) == Columns(4, 1)
    strides = Strided(4).shift(8).terms()
    assert strides == [Term(modulus=4)]


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_mask_mod_answers_pair_by_pair_for_every_head(device: str | torch.device) -> None:
    exclude = BlockWindow(4, 1, 1)
    pattern = (Causal() & (Window(3, 0) | Global((1, 7)))).heads(
        {head: exclude | Random(4, 1, head, exclude) for head in (1, 2)}
    )
    visible = pattern.mask_mod(19, device=device)
    example, head = torch.tensor(0), torch.arange(5)[:, None, None]
    pairs = visible(example, head, torch.arange(19, dtype=torch.int32)[:, None], torch.arange(19, dtype=torch.int32))
    assert torch.equal(pairs[:3], pattern.dense(19))
    for head in (3, 4):
        assert torch.equal(pairs[head], pattern.of_head(head).dense(19))
    common = Documents([0] * 9 + [1] * 10).mask_mod(19)
    pairs = common(example, example, torch.arange(19)[:, None], torch.arange(19))
    assert torch.equal(pairs, Documents([0] * 9 + [1] * 10).dense(19))


def test_a_mask_mod_takes_short_integers_where_the_pattern_speaks_of_large_ones() -> None:
    i, j = torch.arange(9, dtype=torch.int32)[:, None], torch.arange(9, dtype=torch.int32)
    zero = torch.tensor(0, dtype=torch.int32)
    for pattern in (Window(2**40, 0) & Strided(2**33), (Window(2**40, 0) & Strided(2**33)).heads({1: Log()})):
        assert torch.equal(pattern.mask_mod(9)(zero, zero, i, j), torch.eye(9, dtype=torch.bool))


def test_huge_windows_are_unbounded() -> None:
    for pattern in (Window(2**62, 0), Dilated(2**62, 0, 1)):
        assert pattern.offsets() == (0, UNBOUNDED)
        assert torch.equal(pattern.dense(5), Causal().dense(5))
        assert pattern.density(5) == Causal().density(5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Window(2**62 + 1, 0), r"Window: left must be at most 2\*\*62, got 4611686018427387905"),
        (lambda: Sink(2**63), r"Sink: count must be at most 2\*\*62, got 9223372036854775808"),
        (lambda: Columns(2**63, 1), r"Columns: stride must be at most 2\*\*62"),
        (lambda: Window(-1, 0), "Window: left must be an integer of at least 0, got -1; to leave the query itself out"),
        (lambda: Window(0, -2), "Window: right must be an integer of at least 0, got -2; .*intersect with ~Window"),
        (lambda: Window(1.5, 0), "Window: left must be an integer of at least 0, got 1.5"),  # pyright: ignore[reportArgumentType]
        (lambda: Window(True, 0), "Window: left must be an integer of at least 0, got True"),
        (lambda: Dilated(1, -1, 2), "Dilated: right must be an integer of at least 0, got -1"),
        (lambda: Dilated(1, 1, 0), "Dilated: dilation must be an integer of at least 1, got 0; 1 is a plain window"),
        (lambda: Strided(0), "Strided: stride must be an integer of at least 1, got 0; 1 makes every key visible"),
        (lambda: Ngram(0), "Ngram: n must be an integer of at least 1, got 0; with n = 2 a token sees itself alone"),
        (lambda: Block(0), "Block: size must be an integer of at least 1, got 0; it counts the tokens of a block"),
        (lambda: BlockWindow(0, 1, 1), "BlockWindow: size must be an integer of at least 1, got 0"),
        (lambda: BlockWindow(4, -1, 1), "BlockWindow: left must be an integer of at least 0, got -1; it counts blocks"),
        (lambda: BlockWindow(4, 1, -1), "BlockWindow: right must be an integer of at least 0, got -1"),
        (lambda: Columns(0, 1), "Columns: stride must be an integer of at least 1, got 0"),
        (lambda: Columns(4, 0), "Columns: count must be an integer of at least 1, got 0; leave the pattern out"),
        (lambda: Columns(4, 1, -1), "Columns: offset must be an integer of at least 0, got -1"),
        (lambda: Columns(4, 3, 2), r"Columns: count \+ offset = 3 \+ 2 must fit into the stride, got 4; lower them"),
        (lambda: Sink(-1), "Sink: count must be an integer of at least 0, got -1"),
        (lambda: Global(-1), "Global: index must hold positions counted from 0, got -1; count from the start"),
        (lambda: Global([1.5]), "Global: index must hold integers along one dimension, got"),  # pyright: ignore[reportArgumentType]
        (lambda: Global("12"), "Global: index must hold integers along one dimension, got '12'"),  # pyright: ignore[reportArgumentType]
        (lambda: Global(torch.tensor([True])), r"Global: index .*a mask becomes positions by mask.nonzero\(\).flatten"),
        (lambda: Global(torch.tensor([[1]])), "Global: index must hold integers along one dimension"),
        (lambda: Global(1, rows=False, cols=False), "Global: with rows=False and cols=False nothing is visible; leave"),
        (lambda: Global(5).dense(5), "Global: index 5 lies past the end of a sequence of 5 tokens; leave it out"),
        (lambda: Documents([0.5]), "Documents: ids must hold integers along one dimension"),  # pyright: ignore[reportArgumentType]
        (lambda: Documents([0, 1]).dense(3), r"Documents: ids .*each of 3 tokens, got 2 ids; .*Mask\(segments=...\)"),
        (lambda: Random(0, 1, 0), "Random: size must be an integer of at least 1, got 0"),
        (lambda: Random(4, -1, 0), "Random: count must be an integer of at least 0, got -1"),
        (lambda: Random(4, 1, -1), "Random: seed must be an integer of at least 0, got -1; any such number will do"),
        (lambda: Random(4, 1, 0, 7), "Random: exclude must be a pattern, got 7; leave it out to exclude nothing"),  # pyright: ignore[reportArgumentType]
        (lambda: Random(4, 1, 0, Log().heads({1: Causal()})), "Random: exclude must be the same for all heads; give"),
        (
            lambda: Random(1, 1, 0).density(8193),
            "Random: size must cut 8193 tokens into at most 8192 blocks, got 1, whi",
        ),
        (lambda: Causal().heads({-1: Log()}), "heads: a head must be an integer of at least 0, got -1"),
        (lambda: Causal().heads({1: 3}), "heads: head 1 must get a pattern, got 3; leave it out to keep this one"),  # pyright: ignore[reportArgumentType]
        (lambda: Causal().shift(-1), "shift: offset must be an integer of at least 0, got -1; it is the position of"),
        (lambda: Sink(1).shift(-1), "shift: offset must be an integer of at least 0, got -1"),
        (lambda: Causal().shift(2).shift(-1), "shift: offset must be an integer of at least 0, got -1"),
        (lambda: Causal().density(0), "density: length must be an integer of at least 1, got 0"),
        (lambda: Causal().keys_per_query(-1), "keys_per_query: length must be an integer of at least 0, got -1"),
        (lambda: Causal().dense(10**5), "dense: 1 x 100000 x 100000 pairs are too many .*use density, keys_per_query"),
        (lambda: Random(4, 1, 0).visible(torch.tensor(0), torch.tensor(0)), r"Random: resolve\(length\) must come bef"),
        (lambda: Global(0).visible(torch.tensor(0), torch.tensor(0)), r"Global: resolve\(length\) must come before"),
        (lambda: Documents([0]).visible(torch.tensor(0), torch.tensor(0)), r"Documents: resolve\(length\) must come"),
        (
            lambda: Causal().heads({1: Log()}).visible(torch.tensor(0), torch.tensor(0)),
            r"visible: this pattern differs by head; ask pattern.of_head\(h\).visible",
        ),
    ],
)
def test_a_wrong_argument_is_refused_with_what_to_do(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=message):
        build()
