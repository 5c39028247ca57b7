"""Means over the columns that lie beyond the bias for all queries of a strip, one column in place of many.

Strips follow each other, so that each of these means is that of the neighbouring strip joined with a block of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.running_means import Means
from subquad.ops.strip_geometry import Strip, blocks_before, blocks_behind


class Far(NamedTuple):
    """The far means of all strips, those behind from the last strip to the first.

    Attributes:
        before: blocks of columns that come to those before each strip.
        behind: the same behind.
        means_before: over them, (B, G, 1, ·); None for no column.
        means_behind: the same behind; empty where no query sees a later column.
    """

    before: Sequence[slice]
    behind: Sequence[slice]
    means_before: Sequence[Means | None]
    means_behind: Sequence[Means | None]

    @classmethod
    def of(cls, k: Tensor, v: Tensor, strips: Sequence[Strip]) -> Far:
        """All of them, of columns k (B, G, S, E or 1) and v (B, G, S, E)."""
        before = blocks_before(strips)
        behind = [] if strips[0].reach.causal else blocks_behind(strips, k.shape[2])
        return cls(before, behind, joined_means(k, v, before), joined_means(k, v, behind))

    def seen(self, strip: int) -> list[Means]:
        """What a strip sees far from it: one or two means, or none."""
        behind = self.means_behind[-1 - strip] if self.means_behind else None
        return [mean for mean in (self.means_before[strip], behind) if mean is not None]

    def add_gradients_(
        self, gradients: tuple[Tensor, Tensor], k: Tensor, v: Tensor, of_seen: Sequence[Sequence[Means]]
    ) -> None:
        """Add to the gradients of k and v what those of the means bring that each strip sees."""
        of_before = [found[0] if mean else None for found, mean in zip(of_seen, self.means_before, strict=True)]
        add_joined_gradients_(gradients, k, v, self.before, self.means_before, of_before)
        if self.behind:
            pairs = zip(reversed(of_seen), self.means_behind, strict=True)
            of_behind = [found[-1] if mean else None for found, mean in pairs]
            add_joined_gradients_(gradients, k, v, self.behind, self.means_behind, of_behind)


def joined_means(k: Tensor, v: Tensor, blocks: Sequence[slice]) -> list[Means | None]:
    """For each block the mean over all columns of it and the blocks before it; None for none.

    Args:
        k: (B, G, S, E or 1), logarithms of weights.
        v: (B, G, S, E).
        blocks: of columns, some of them empty.

    Returns:
        Means (B, G, 1, ·).
    """
    found: list[Means | None] = []
    last = None
    for block in blocks:
        if block.start < block.stop:
            log_weights, values = _joined(k, v, block, last)
            total = log_weights.logsumexp(dim=2, keepdim=True)
            last = Means(total, ((log_weights - total).exp_() * values).sum(dim=2, keepdim=True))
        found.append(last)
    return found


def add_joined_gradients_(
    gradients: tuple[Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    blocks: Sequence[slice],
    means: Sequence[Means | None],
    of_means: Sequence[Means | None],
) -> None:
    """Add to the gradients of k and v what those of the means bring; other arguments as in `joined_means`.

    Args:
        gradients: of k and v.
        k: (B, G, S, E or 1).
        v: (B, G, S, E).
        blocks: of columns.
        means: the result of `joined_means`.
        of_means: gradients of totals and means, None where the mean is.
    """
    carried = None
    for i in reversed(range(len(blocks))):
        mean, block, own = means[i], blocks[i], of_means[i]
        if mean is None or own is None:
            continue
        carried = own if carried is None else Means(own.total + carried.total, own.mean + carried.mean)
        if block.start == block.stop:
            continue
        last = means[i - 1] if i else None
        log_weights, values = _joined(k, v, block, last)
        shares = (log_weights - mean.total).exp_()
        of_values = shares * carried.mean
        of_weights = (of_values * (values - mean.mean)).sum_to_size(shares.shape).addcmul_(shares, carried.total)
        begin = 0 if last is None else 1
        gradients[0][:, :, block] += of_weights[:, :, begin:]
        gradients[1][:, :, block] += of_values[:, :, begin:]
        carried = None if last is None else Means(of_weights[:, :, :1], of_values[:, :, :1])


def _joined(k: Tensor, v: Tensor, block: slice, last: Means | None) -> tuple[Tensor, Tensor]:
    """Logarithms of weights and values of a block, behind the mean of what comes before it."""
    if last is None:
        return k[:, :, block], v[:, :, block]
    return torch.cat((last.total, k[:, :, block]), dim=2), torch.cat((last.mean, v[:, :, block]), dim=2)
