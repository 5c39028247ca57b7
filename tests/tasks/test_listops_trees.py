import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad.tasks.listops import evaluate, symbols, tokenize
from subquad.tasks.listops_trees import Expressions, Shape, draw_expressions, text_pieces

SMALL = Shape(longer_than=3, shorter_than=10_000, max_depth=3, max_args=4)
FULL = Shape(longer_than=500, shorter_than=2000, max_depth=10, max_args=10)


def draw(count: int, shape: Shape, seed: int = 0) -> Expressions:
    return draw_expressions(np.random.PCG64(seed), count, shape)


def texts(expressions: Expressions, shape: Shape) -> list[str]:
    pieces = text_pieces(shape.max_args)
    return [b"".join(pieces[code] for code in codes).decode().removesuffix(" ) ") for codes, _ in expressions]


def length_by_definition(source: random.Random, depth: int, shape: Shape) -> int:
    """Token count of one tree, drawn node by node in the order of the official generator."""
    r = source.random() if depth < shape.max_depth else 1.0
    if r > 0.25:
        return 1
    count = source.randint(2, shape.max_args)
    return 2 + sum(length_by_definition(source, depth + 1, shape) for _ in range(count))


def moments_by_recursion(shape: Shape, depth: int = 1) -> tuple[float, float]:
    """Mean and variance of a tree's token count, exactly."""
    if depth == shape.max_depth:
        return 1.0, 0.0
    mean, variance = moments_by_recursion(shape, depth + 1)
    arities = np.arange(2, shape.max_args + 1)
    first = 2 + arities * mean
    second = arities * variance + first**2
    total = 0.75 + 0.25 * first.mean()
    return total, 0.75 + 0.25 * second.mean() - total**2


@given(st.integers(3, 60), st.integers(2, 100), st.integers(2, 6), st.integers(2, 12), st.integers(0, 2**32))
def test_lengths_are_strictly_between_the_bounds(longer: int, room: int, depth: int, args: int, seed: int):
    shape = Shape(longer, longer + room, depth, args)
    lengths = np.diff(draw(200, shape, seed).offsets)
    assert np.all((lengths > longer) & (lengths < longer + room))


@given(st.integers(2, 6), st.integers(2, 12), st.integers(0, 2**32))
def test_labels_and_lengths_are_those_of_the_text(depth: int, args: int, seed: int):
    shape = Shape(3, 300, depth, args)
    expressions = draw(60, shape, seed)
    for text, label, length in zip(
        texts(expressions, shape), expressions.values, np.diff(expressions.offsets), strict=True
    ):
        tokens = tokenize(text)
        assert evaluate(tokens) == label
        assert len(tokens) == length


def test_labels_are_right_at_full_length():
    expressions = draw(2000, FULL)
    assert len(expressions.values) > 100
    for text, label in zip(texts(expressions, FULL)[:40], expressions.values, strict=False):
        assert evaluate(tokenize(text)) == label


def pair_up(words: list[str]) -> str:
    """The left-leaning form of the released files, built from the definition: (previous, child) again and again."""
    stack: list[str] = []
    for word in words:
        if word.startswith("["):
            stack.append(word)
            continue
        finished = f"( {stack.pop()} ] )" if word == "]" else word
        stack.append(f"( {stack.pop()} {finished} )" if stack else finished)
    return stack[0]


def test_text_is_the_released_form_character_by_character():
    assert pair_up(["[MAX", "2", "9", "]"]) == "( ( ( [MAX 2 ) 9 ) ] )"
    for text in texts(draw(400, SMALL), SMALL):
        assert pair_up([symbols[token - 1] for token in tokenize(text)]) == text


def test_depth_and_number_of_arguments_reach_their_bounds_and_no_further():
    shape = Shape(3, 10_000, 4, 5)
    deepest, most = 0, 0
    for text in texts(draw(4000, shape), shape):
        arguments: list[int] = []
        for token in tokenize(text):
            if token == 15:
                most = max(most, arguments.pop())
                continue
            if arguments:
                arguments[-1] += 1
            if token > 10:
                arguments.append(0)
            deepest = max(deepest, len(arguments))
    assert deepest == shape.max_depth - 1
    assert most == shape.max_args


def test_one_root_in_four_is_an_operator():
    count = 40_000
    share = len(draw(count, SMALL).values) / count
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / count)


@pytest.mark.parametrize("shape", [SMALL, Shape(3, 10_000, 5, 10), Shape(3, 10_000, 2, 2)])
def test_mean_length_is_that_of_the_recursion(shape: Shape):
    count = 40_000
    mean, variance = moments_by_recursion(shape)
    expressions = draw(count, shape)
    roots_that_are_leaves = count - len(expressions.values)
    drawn = (len(expressions.pieces) + roots_that_are_leaves) / count
    assert abs(drawn - mean) < 4 * math.sqrt(variance / count)


def test_lengths_are_distributed_as_when_drawn_node_by_node():
    shape = Shape(20, 80, 5, 6)
    source = random.Random(0)
    by_definition = [length_by_definition(source, 1, shape) for _ in range(20_000)]
    expected = np.array([length for length in by_definition if 20 < length < 80])
    got = np.diff(draw(20_000, shape).offsets)
    assert abs(len(got) - len(expected)) < 4 * math.sqrt(2 * len(expected))
    grid = np.arange(20, 80)
    gap = np.abs(
        np.searchsorted(np.sort(got), grid) / len(got) - np.searchsorted(np.sort(expected), grid) / len(expected)
    )
    assert gap.max() < 1.95 * math.sqrt(1 / len(got) + 1 / len(expected))


def test_operators_arities_and_digits_are_uniform():
    expressions = draw(40_000, SMALL)
    codes = np.bincount(expressions.pieces, minlength=11 + 4 * 3)
    for counts in (codes[:10], codes[11:23].reshape(4, 3).sum(1), codes[11:23].reshape(4, 3).sum(0)):
        expected = counts.sum() / len(counts)
        assert np.abs(counts - expected).max() < 4.5 * math.sqrt(expected)


def test_few_accepted_of_many_drawn_at_full_length():
    lengths = np.diff(draw(4096, FULL).offsets)
    assert 0.05 < len(lengths) / 4096 < 0.12
    assert np.median(lengths) < 1250


def test_a_draw_that_accepts_nothing_is_empty():
    expressions = draw(50, Shape(9000, 9002, 3, 3))
    assert len(expressions.values) == 0
    assert list(expressions) == []


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0, 10, 3, 3), "longer_than must be at least 1"),
        ((9, 10, 3, 3), "no expression is longer than 9 and shorter than 10"),
        ((1, 4, 3, 3), "no expression is longer than 1 and shorter than 4"),
        ((3, 10, 1, 3), "max_depth must be at least 2"),
        ((3, 10, 3, 1), "max_args must be from 2 to 60, got 1"),
        ((3, 10, 3, 61), "max_args must be from 2 to 60, got 61"),
    ],
)
def test_bounds_that_nothing_satisfies_are_refused(bounds: tuple[int, int, int, int], message: str):
    with pytest.raises(ValueError, match=message):
        Shape(*bounds)
