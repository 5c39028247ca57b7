"""ListOps expressions as tokens: the vocabulary, the way from text to ids, and the value of an expression.

The released files write an expression as a binary tree in parentheses, leaning left. The parentheses carry nothing
that the closing brackets don't, so the model never sees them (nor does it in the official code).

Ids are fixed: 0 is padding, 1 .. 15 are the symbols in the order below, 16 stands for anything else. The official code
numbers the symbols in an arbitrary order that changes from run to run.
"""

import numpy as np

symbols: tuple[str, ...] = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "[MIN", "[MAX", "[MED", "[SM", "]")
PAD_TOKEN_ID = 0
UNKNOWN_TOKEN_ID = 16
VOCAB_SIZE = 17
NUM_LABELS = 10

MIN, MAX, MED, SM, CLOSE = 11, 12, 13, 14, 15
_IDS = {symbol: index for index, symbol in enumerate(symbols, start=1)}


def tokenize(source: str) -> np.ndarray:
    """Ids of an expression's symbols, parentheses dropped; uint8, (length,)."""
    words = source.replace("(", "").replace(")", "").split()
    return np.array([_IDS.get(word, UNKNOWN_TOKEN_ID) for word in words], dtype=np.uint8)


def apply_operator(operator: int, values: list[int]) -> int:
    """Value of one operator over its arguments, all digits.

    MED of an even number of arguments is the mean of the two middle ones, rounded down; SM is the sum modulo 10.
    """
    if operator == MIN:
        return min(values)
    if operator == MAX:
        return max(values)
    if operator == SM:
        return sum(values) % 10
    ordered, count = sorted(values), len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) // 2


def evaluate(tokens: np.ndarray) -> int:
    """Value (0 .. 9) of an expression given as ids, (length,).

    Raises:
        ValueError: if the tokens are not exactly one expression; says at which token.
    """
    stack: list[tuple[int, list[int]]] = []
    values: list[int] = []
    for index, token in enumerate(tokens.tolist()):
        if values and not stack:
            raise ValueError(f"expected one expression, but it is complete before token {index}")
        if 1 <= token <= 10:
            values.append(token - 1)
        elif MIN <= token <= SM:
            stack.append((token, values))
            values = []
        elif token == CLOSE and stack and values:
            operator, outer = stack.pop()
            values = [*outer, apply_operator(operator, values)]
        elif token == CLOSE:
            raise ValueError(f"token {index} is a ']' that closes {'no arguments' if stack else 'no operator'}")
        else:
            raise ValueError(f"token {index} has id {token}: expected a digit, an operator or ']' (ids 1 to 15)")
    if stack or not values:
        raise ValueError(f"expected a complete expression, got {len(tokens)} tokens that leave {len(stack)} open")
    return values[0]
