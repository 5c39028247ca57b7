"""How the regions of a plan are summarised: whose queries read their tokens, and by which keys they are seen."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from subquad.ops.combiner.blocks import Blocks
from subquad.ops.combiner.layout import Example
from subquad.ops.combiner.region_rows import LargestRows, OwnRows, PooledRows, RegionRows
from subquad.ops.combiner.stream import Members
from subquad.ops.combiner.summarize import Options, Summarize
from subquad.ops.precision import full_precision


class RegionSummary(ABC):
    """Queries and keys of regions, in the definition, in a run over all regions and in a stream."""

    def key_of_region(self, own: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        """The key (H, E) of one region, for the definition.

        Args:
            own: that of the asking token, or what is pooled, (H, E).
            weights: of the region's tokens, by which values are averaged, (M, H, 1).
            keys: of these tokens, (M, H, E).
        """
        del weights, keys
        return own

    @abstractmethod
    def queries(self, q: Tensor, weight: Tensor | None, example: Example, options: Options) -> RegionRows:
        """Those of all regions, of those of tokens (G, padded, E) and the weight (E, E) of features."""

    @abstractmethod
    def keys(self, k: Tensor, weight: Tensor | None, example: Example, options: Options) -> RegionRows | None:
        """Likewise; None where they are averages of the tokens' keys, with the weights of the values."""

    @abstractmethod
    def own_scores(self, blocks: Blocks | None, q: Tensor, k: Tensor, scale: float) -> Tensor | None:
        """Scores (G, n, m, m) of tokens with their blocks that are those of regions too; None where there are none."""

    @abstractmethod
    def summarise_members(self, members: Members, summarize: Summarize) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, R, E) of regions of a stream."""


class PooledSummary(RegionSummary):
    """Queries and keys are pooled from those of a region's tokens."""

    def queries(self, q: Tensor, weight: Tensor | None, example: Example, options: Options) -> RegionRows:
        """Pooled; where nothing but maxima of whole blocks is asked for, these."""
        layout = example.layout
        plain = options.reduce == "max" and not options.rectified and example.kept is None and example.sizes is None
        if plain and layout.blocks is not None:
            return LargestRows(q, layout.regions, layout.blocks.size)
        return PooledRows(q, weight, example, options)

    def keys(self, k: Tensor, weight: Tensor | None, example: Example, options: Options) -> RegionRows:
        """As queries."""
        return self.queries(k, weight, example, options)

    def own_scores(self, blocks: Blocks | None, q: Tensor, k: Tensor, scale: float) -> None:
        """None: no token asks."""

    def summarise_members(self, members: Members, summarize: Summarize) -> tuple[Tensor, Tensor]:
        """Average the values by the pooled queries, and pool the keys."""

        def pool(x: Tensor, weight: Tensor | None) -> Tensor:
            if summarize.activation != "identity":
                x = (x if weight is None else x @ weight.to(x.dtype).T).relu()
            if summarize.reduce == "max":
                largest = x.masked_fill(~members.there, -torch.inf).max(dim=-2).values
                return largest.masked_fill(~members.there.any(dim=-2), 0.0)
            total = x.masked_fill(~members.there, 0.0).sum(dim=-2)
            return total if summarize.reduce == "sum" else total / members.there.sum(dim=-2).clamp_min(1)

        with full_precision(members.k.device):
            _, values = members.averages(pool(members.q, summarize.query_weight))
            return pool(members.k, summarize.key_weight), values


class _AskedSummary(RegionSummary):
    """A region for each token, which is asked with its query: nothing is pooled."""

    def queries(self, q: Tensor, weight: Tensor | None, example: Example, options: Options) -> RegionRows:
        """The tokens' own."""
        del weight, options
        return OwnRows(q, example.layout.regions)

    def own_scores(self, blocks: Blocks | None, q: Tensor, k: Tensor, scale: float) -> Tensor | None:
        """A token asks its block as it does for itself."""
        return None if blocks is None else blocks.own_scores(q, k, scale)


class OwnKeySummary(_AskedSummary):
    """A region is seen by the key of the token that asks it."""

    def keys(self, k: Tensor, weight: Tensor | None, example: Example, options: Options) -> RegionRows:
        """The tokens' own."""
        return self.queries(k, weight, example, options)

    def summarise_members(self, members: Members, summarize: Summarize) -> tuple[Tensor, Tensor]:
        """Average the values by the asking tokens' queries."""
        del summarize
        _, values = members.averages(members.of_asking(members.kept.q))
        return members.of_asking(members.kept.k), values


class AverageKeySummary(_AskedSummary):
    """A region is seen by the average of its keys, as its value is that of its values."""

    def key_of_region(self, own: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        """Averaged."""
        del own
        return (weights * keys).sum(dim=0)

    def keys(self, k: Tensor, weight: Tensor | None, example: Example, options: Options) -> None:
        """None: averages."""

    def summarise_members(self, members: Members, summarize: Summarize) -> tuple[Tensor, Tensor]:
        """Average both by the asking tokens' queries."""
        del summarize
        return members.averages(members.of_asking(members.kept.q))
