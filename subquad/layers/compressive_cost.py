"""The price of the Compressive Transformer: attention to tokens and rows, and the loss that trains the compression."""

from __future__ import annotations

from subquad.costs import Cost
from subquad.interface import Dims
from subquad.ops.memory.evictions import Tally


def memories_cost(
    dims: Dims, length: int, dtype_bytes: int, seen: Tally, *, zeros: tuple[int, int], own_positions: bool, chosen: bool
) -> Cost:
    """Beyond the projections of the call: distances, three products for each visible pair, and all that is stored.

    Autograd keeps the encodings of distances and their projections, stored zeros and rows, their keys and values, the
    log-sum-exps, and, where rows are seen, what is read of tokens and of rows.

    Args:
        dims: of the mixer.
        length: L.
        dtype_bytes: of a number.
        seen: what the segments see and make.
        zeros: attended zeros before the first token, and among the rows.
        own_positions: whether rows have a W_r and a w of their own.
        chosen: whether tokens become rows by usage, for which all scores are computed once more.
    """
    inner, weights, wide = dims.inner_dim, dims.embed_dim * dims.inner_dim, max(4, dtype_bytes)
    pairs, rows = seen.pairs + seen.row_pairs, zeros[1] + seen.rows if seen.row_pairs else 0
    if own_positions:
        distances = seen.farthest + 1 + (seen.farthest_row + 1 if rows else 0)
    else:
        distances = max(seen.farthest, seen.farthest_row if rows else 0) + 1
    if not length:
        distances, zeros = 0, (0, 0)
    again = chosen and seen.rows > 0
    projected = distances + 2 * (zeros[0] + rows) + (zeros[1] if again else 0)
    of_rows = (2 * dtype_bytes * inner + wide * dims.num_heads) * length if rows else 0
    return Cost(
        flops=2 * projected * weights + 2 * (5 if again else 3) * pairs * inner,
        activation_bytes=dtype_bytes * distances * (dims.embed_dim + inner)
        + dtype_bytes * (zeros[0] + rows) * (dims.embed_dim + 2 * inner)
        + wide * dims.num_heads * length
        + of_rows,
        parameters=(2 if own_positions else 1) * (weights + inner) + inner,
    )


def attention_loss_cost(dims: Dims, seen: Tally, dtype_bytes: int) -> Cost:
    """Keys and values of rows, and for every run its segment's queries read its tokens and its rows.

    Autograd keeps queries, keys and values of rows, what is read and what should have been, and log-sum-exps.
    """
    inner, wide = dims.inner_dim, max(4, dtype_bytes)
    widened = wide if wide > dtype_bytes else 0
    queries, rows = (sum(run[index] for run in seen.runs) for index in (0, 2))
    reads = sum(run[0] * (run[1] + run[2]) for run in seen.runs)
    return Cost(
        flops=2 * 2 * rows * dims.embed_dim * inner + 2 * 2 * reads * inner,
        activation_bytes=(2 * dtype_bytes + wide + widened) * queries * inner
        + wide * queries * dims.num_heads
        + 2 * dtype_bytes * rows * inner,
    )


def decoding_loss_cost(dims: Dims, seen: Tally, rate: int, dtype_bytes: int) -> Cost:
    """The decoder, and the tokens that it makes. Autograd keeps rows, what is decoded and what should have been."""
    tokens = seen.rows * rate
    return Cost(
        flops=2 * tokens * dims.embed_dim**2,
        activation_bytes=dtype_bytes * seen.rows * dims.embed_dim + 2 * max(4, dtype_bytes) * tokens * dims.embed_dim,
        parameters=rate * dims.embed_dim**2,
    )
