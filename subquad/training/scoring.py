"""From logits to what a metric adds up: right answers or bits, by example and by position.

Evaluation keeps these sums and no logits, so that its memory doesn't grow with vocabulary or length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from subquad.labels import IGNORED
from subquad.ops.precision import wide_dtype
from subquad.records.metrics import Bits, Estimate, MetricKind, Share, estimate

Score = Callable[[Tensor, Tensor], Tensor]
"""Of logits (B, T, V) and labels int64 (B, T), float32 or wider (B, T), 0 where the label is ignored."""


def right_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where the likeliest answer is the label."""
    return (logits.argmax(dim=-1) == labels).double()


def bits(logits: Tensor, labels: Tensor) -> Tensor:
    """-log2 of the probability of each label."""
    wide = logits.to(wide_dtype(logits))
    nats = functional.cross_entropy(wide.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return nats.double() / math.log(2)


_SCORES: Mapping[type[MetricKind], Score] = MappingProxyType({Share: right_answers, Bits: bits})


def score_of(kind: MetricKind) -> Score:
    """What a metric adds up."""
    return _SCORES[type(kind)]


class Bucket(NamedTuple):
    """A score over the positions `first` to `last` of all examples, and how many questions stand there."""

    first: int
    last: int
    asked: int
    value: float


Bounds = tuple[tuple[int, int], ...]
"""Buckets of positions, the first and the last position of each."""


def bucket_bounds(length: int) -> Bounds:
    """Buckets of positions 1 .. length - 1 that double: (1, 1), (2, 3), (4, 7) ..., first and last position."""
    firsts = [1 << power for power in range(max(length - 1, 0).bit_length())]
    return tuple((first, min(2 * first, length) - 1) for first in firsts)


class Sums(NamedTuple):
    """What a batch scored: float64 and int64, (B,), and the same by bucket of positions, (B, K); K may be 0."""

    totals: Tensor
    asked: Tensor
    totals_by_bucket: Tensor
    asked_by_bucket: Tensor


def sum_up(score: Score, logits: Tensor, labels: Tensor, bounds: Bounds = (), start: int | Tensor = 0) -> Sums:
    """The sums of a batch.

    Args:
        score: of the metric.
        logits: (B, T, V).
        labels: int64 (B, T), `IGNORED` where nothing is asked.
        bounds: buckets of positions, none to tell no positions apart.
        start: position of the first label, of all examples or int64 (B,) of each.
    """
    asked = labels != IGNORED
    totals = score(logits, labels).masked_fill(~asked, 0.0)
    begins = torch.as_tensor(start, device=labels.device).expand(labels.shape[0])
    positions = begins[:, None] + torch.arange(labels.shape[1], device=labels.device)
    totals_by_bucket = totals.new_zeros(labels.shape[0], len(bounds))
    asked_by_bucket = torch.zeros_like(totals_by_bucket, dtype=torch.int64)
    for bucket, (first, last) in enumerate(bounds):
        inside = (positions >= first) & (positions <= last)
        totals_by_bucket[:, bucket] = totals.masked_fill(~inside, 0.0).sum(dim=1)
        asked_by_bucket[:, bucket] = (asked & inside).sum(dim=1)
    return Sums(totals.sum(dim=1), asked.sum(dim=1), totals_by_bucket, asked_by_bucket)


@dataclass(frozen=True)
class Measured:
    """The score of a split.

    Attributes:
        estimate: value and standard error.
        examples: how many ask for something.
        asked: for how much.
        by_position: buckets in which something is asked.
    """

    estimate: Estimate
    examples: int
    asked: int
    by_position: tuple[Bucket, ...]


def measure(
    totals: np.ndarray,
    asked: np.ndarray,
    totals_by_bucket: np.ndarray,
    asked_by_bucket: np.ndarray,
    bounds: Bounds,
) -> Measured:
    """The score of a split from the sums of all its examples, as `Sums` has them.

    Raises:
        ValueError: nothing was asked.
    """
    found = estimate(totals.tolist(), asked.tolist())
    buckets = zip(bounds, totals_by_bucket.sum(axis=0).tolist(), asked_by_bucket.sum(axis=0).tolist(), strict=True)
    by_position = tuple(Bucket(first, last, count, total / count) for (first, last), total, count in buckets if count)
    return Measured(found, int((asked > 0).sum()), int(asked.sum()), by_position)
