"""Locality-sensitive hashing of vectors by random rotations: vectors at a small angle tend to share a bucket.

    bucket(x) = argmax [xR; -xR]        R: (E, b / 2), Gaussian (arXiv 1509.02897)

A count of buckets may be a product b_1 b_2 ...: the hashes by independent rotations are the digits of the bucket, which
takes (b_1 + b_2 + ...) / 2 columns in place of b_1 b_2 ... / 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subquad.ops.precision import full_precision, wide_dtype

LARGEST_FACTOR = 128
"""Buckets of one factor of a derived count; the products with the rotations stay linear in the length."""

ROWS = 4096
"""Vectors that are hashed at a time, of several examples where they are short; products stay in the cache."""


def random_rotations(rounds: int, num_heads: int, width: int, columns: int, *, generator: torch.Generator) -> Tensor:
    """Gaussian R, float64 (rounds, H, E, columns), on the CPU; further rounds leave the first ones as they are."""
    return torch.randn(rounds, num_heads, width, columns, generator=generator, dtype=torch.float64)


def rotation_columns(factors: tuple[int, ...]) -> int:
    """Columns of R that hash into these factors."""
    return sum(factor // 2 for factor in factors)


def derived_factors(length: int, chunk: int) -> tuple[int, ...]:
    """The count of buckets at which one holds half a chunk on average, 2 L / chunk, as powers of 2.

    Up to `LARGEST_FACTOR` it is one factor, beyond it two; beyond the square of that it stops growing.
    """
    exponent = max(1, (2 * length // chunk).bit_length() - 1)
    if 2**exponent <= LARGEST_FACTOR:
        return (2**exponent,)
    first = min(exponent // 2, LARGEST_FACTOR.bit_length() - 1)
    return 2**first, 2 ** min(exponent - first, LARGEST_FACTOR.bit_length() - 1)


def check_buckets(owner: str, factors: tuple[int, ...]) -> None:
    """Check a count of buckets.

    Raises:
        ValueError: no factor, or one that is neither 1 nor even.
    """
    if not factors or any(factor < 1 or (factor > 1 and factor % 2) for factor in factors):
        raise ValueError(
            f"{owner}: buckets must be 1 or even, since every direction and its opposite are two buckets, or a list of "
            f"such factors; got {factors[0] if len(factors) == 1 else factors}"
        )


def hash_into_buckets(x: Tensor, rotations: Tensor, factors: tuple[int, ...]) -> Tensor:
    """The bucket of every vector, in every round; no gradient.

    Args:
        x: (B, H, L, E); its length doesn't matter.
        rotations: (rounds, H, E, C), C at least `rotation_columns(factors)`; the first columns are used.
        factors: the count of buckets is their product.

    Returns:
        int64 (B, H, rounds, L).
    """
    wide, columns = wide_dtype(x), rotation_columns(factors)
    batch, num_heads, length, _ = x.shape
    found = torch.zeros(batch, num_heads, len(rotations), length, dtype=torch.int64, device=x.device)
    if not columns:
        return found
    some = max(1, ROWS // max(1, length))
    with torch.no_grad(), full_precision(x.device):
        for head, rotation in enumerate(rotations.to(wide)[..., :columns].permute(1, 2, 0, 3).flatten(2)):
            for examples in range(0, batch, some):
                vectors = x[examples : examples + some, head].to(wide)
                rotated = (vectors @ rotation).unflatten(-1, (len(rotations), columns))
                found[examples : examples + some, head] = _digits(rotated, rotated.abs(), factors).transpose(1, 2)
    return found


def _digits(rotated: Tensor, sizes: Tensor, factors: tuple[int, ...]) -> Tensor:
    """The bucket, (..., C) -> (...), whose digits are the largest of [x; -x] among the columns of each factor."""
    bucket, unit, widths = torch.zeros_like(rotated[..., 0], dtype=torch.int64), 1, [factor // 2 for factor in factors]
    for columns, size, width in zip(rotated.split(widths, dim=-1), sizes.split(widths, dim=-1), widths, strict=True):
        if width:
            index = size.max(dim=-1, keepdim=True).indices  # the first of equals, as argmax, in two thirds of its time
            bucket += unit * torch.where(columns.gather(-1, index) < 0, index + width, index)[..., 0]
            unit *= 2 * width
    return bucket


def num_buckets(factors: tuple[int, ...]) -> int:
    """The count of buckets."""
    return math.prod(factors)
