import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad.tasks.listops import evaluate, symbols, tokenize

expressions = st.recursive(
    st.integers(0, 9).map(str),
    lambda child: st.tuples(st.sampled_from(symbols[10:14]), st.lists(child, min_size=1, max_size=5)).map(
        lambda node: f"{node[0]} {' '.join(node[1])} ]"
    ),
    max_leaves=30,
)


def value(text: str) -> int:
    return evaluate(tokenize(text))


def test_symbols_have_the_ids_1_to_15_in_a_fixed_order():
    assert symbols == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "[MIN", "[MAX", "[MED", "[SM", "]")
    tokens = tokenize(" ".join(symbols))
    assert tokens.tolist() == list(range(1, 16))
    assert tokens.dtype == np.uint8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 7),
        ("[MIN 4 2 9 ]", 2),
        ("[MAX 4 2 9 ]", 9),
        ("[SM 9 9 ]", 8),
        ("[SM 5 5 ]", 0),
        ("[MED 1 2 ]", 1),
        ("[MED 2 1 ]", 1),
        ("[MED 1 2 9 ]", 2),
        ("[MED 9 0 9 0 ]", 4),
        ("[MAX 2 [MED 4 7 9 ] 3 ]", 7),
        ("( ( ( ( [MAX 2 ) ( ( ( ( [MED 4 ) 7 ) 9 ) ] ) ) 3 ) ] )", 7),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
    ],
)
def test_values_follow_the_operators(text: str, expected: int):
    assert value(text) == expected


@given(expressions)
def test_ids_read_back_as_the_text_they_came_from(text: str):
    assert " ".join(symbols[token - 1] for token in tokenize(text)) == text


@given(expressions)
def test_every_expression_has_a_digit_for_value(text: str):
    assert 0 <= value(text) <= 9


def test_parentheses_are_dropped_before_words_are_split():
    assert tokenize("( ( [MIN 1)2 ) ]").tolist() == [11, 16, 15]


def test_symbols_outside_the_vocabulary_are_unknown():
    assert tokenize("[FIRST 1 12 é ]").tolist() == [16, 2, 16, 16, 15]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a complete expression, got 0 tokens"),
        ("[MIN 1 2", "leave 1 open"),
        ("1 2", "complete before token 1"),
        ("[MIN 1 2 ] ]", "complete before token 4"),
        ("]", "token 0 is a ']' that closes no operator"),
        ("[MIN ]", "token 1 is a ']' that closes no arguments"),
        ("[MIN 1 x ]", "token 2 has id 16: expected a digit, an operator or ']'"),
    ],
)
def test_what_is_not_one_expression_has_no_value(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        value(text)
