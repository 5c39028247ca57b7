"""Combiner: full attention in which distant tokens are grouped in regions, each attended through a summary.

Ren et al. 2021, "Combiner: Full Attention Transformer with Sparse Computation Cost", arXiv:2107.05768.

    o_i = Σ_{j in Ω⁰_i} exp(q_i · k_j / √E) / Z_i v_j + Σ_{regions r of i} exp(q_i · k_r / √E) / Z_i μ_r
    μ_r = Σ_{j in r} softmax_{j in r}(q_r · k_j / √E) v_j        q_r, k_r: maxima over r, Z_i: the sum of all numerators

    fixed:       Ω⁰ the own segment of b tokens; every other segment a region            causal: those before
    logsparse:   Ω⁰ the token and its neighbour in a pair; of the aligned blocks of 2, 4, 8, ... tokens, the one beside
                 the token's own                                                          causal: those before
    grid of rows of b tokens; Ω⁰ the token's row and column, for rowmajor its row         causal: up to the token
    vertical:    every other column without the token's row                              causal: its rows above
    horizontal:  every other row without the token's column                              causal: each row above
    rowmajor:    every other row; q_r is the query of its token in the own column, k_r made by `row_summary`
    mixture:     the mean of vertical and horizontal ("mean"), or one softmax over the cross, the regions of vertical
                 and, for each row above, its tokens left and right of the own column ("joint", causal alone)

Cost O(L² D / b + L b D) for fixed and the grids, which is O(L √L D) with b = √L; O(L log L D) for logsparse. Every
token attends to all: a query's weights sum to 1 over everything it may see. A region weighs as much as one token.

Departures: the paper's bidirectional logsparse and grid plans stand in an appendix; here they are its regions without
the restriction to the past. The official code drops a level of logsparse where L - 1 is a power of two, counts the own
segment twice in its bidirectional form, takes running sums where the paper has maxima, needs whole segments and
ignores padding. A plan called axial there is rowmajor here. The neighbour of logsparse is a region of one token in the
paper, which is the same without an activation. Learned regions and decoding from a state are not offered, nor dropout
inside summaries. Segments and rows count valid tokens: an invalid token takes no position. A token missing at the end
of the last row asks, in bidirectional rowmajor, with a query and key of 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.heads import BY_HEADS, HeadMixer, Heads, initialise_projection, projection_cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.mask import Mask
from subquad.ops.combiner.attention import Summarize, combiner_attention, combiner_attention_with_summaries
from subquad.ops.combiner.grid import Horizontal, JointMixture, Rowmajor, Vertical
from subquad.ops.combiner.levels import Logsparse
from subquad.ops.combiner.plans import Fixed, Plan
from subquad.ops.packing import has_gaps, put_back, take, valid_first
from subquad.ops.pattern.attention import pattern_attention
from subquad.patterns.blocks import Block
from subquad.registry import register
from subquad.state import State

PlanName = Literal["fixed", "logsparse", "vertical", "horizontal", "rowmajor", "mixture"]


@register("combiner")
@dataclass(frozen=True, kw_only=True)
class CombinerConfig(MixerConfig):
    """Options of Combiner. Those of other plans must be left out."""

    family: ClassVar[str] = "factorised"

    plan: PlanName = "fixed"
    """How the keys of a token are split into direct ones and regions."""
    block: int = 128
    """b, tokens of a segment (fixed), or of a row of the grid; best near √(2 L) and √L. Nothing to logsparse."""
    pooling: Literal["max", "mean", "sum"] = "max"
    """How the queries and the keys of a region's tokens become one; for rowmajor nothing is pooled."""
    activation: Literal["identity", "relu", "deepset"] = "identity"
    """What is pooled: queries and keys, max(x, 0) of them, or max(W x, 0) with W learned, one for all heads."""
    log_size_bias: bool = False
    """Add the logarithm of its number of tokens to a region's score, so that it weighs as many."""
    row_summary: Literal["none", "wsum", "proj", "wsum_proj"] | None = None
    """rowmajor, key of a region: that of its asking token, the average of its keys, or the average of its values
    ("proj") or keys through W₂ LayerNorm(x + W₁ ·). None for "proj"."""
    mixture: Literal["mean", "joint"] | None = None
    """mixture: the mean of two plans, as in the paper, or one softmax, as in the official code. None for "mean"."""

    def __post_init__(self) -> None:
        """Check ranges, and fill in the default of the chosen plan."""
        super().__post_init__()
        if self.block < 1:
            raise ValueError(f"combiner: block counts the tokens of a segment or row, at least 1; got {self.block}")
        for option, plan, default in (("row_summary", "rowmajor", "proj"), ("mixture", "mixture", "mean")):
            value = getattr(self, option)
            if self.plan == plan:
                object.__setattr__(self, option, value or default)
            elif value is not None:
                raise ValueError(
                    f"combiner: {option}={value!r} is an option of plan={plan!r} and this is plan={self.plan!r}; leave "
                    "it out or choose that plan"
                )
        if self.plan == "rowmajor" and (self.pooling, self.activation) != ("max", "identity"):
            raise ValueError(
                "combiner: plan='rowmajor' pools nothing; leave pooling and activation out, got "
                f"{self.pooling!r} and {self.activation!r}"
            )

    @property
    def traits(self) -> Traits:
        """The joint mixture looks back alone."""
        return Traits(bidirectional=self.mixture != "joint", causal=True, padding=True)

    @property
    def projects_rows(self) -> bool:
        """Whether regions get their keys by projections."""
        return self.row_summary in ("proj", "wsum_proj")

    def plans(self) -> tuple[Plan, ...]:
        """The plan, or those whose mean is taken."""
        if self.plan == "mixture" and self.mixture == "mean":
            return Vertical(self.block), Horizontal(self.block)
        return {
            "fixed": (Fixed(self.block),),
            "logsparse": (Logsparse(),),
            "vertical": (Vertical(self.block),),
            "horizontal": (Horizontal(self.block),),
            "rowmajor": (self.grid,),
            "mixture": (JointMixture(self.block),),
        }[self.plan]

    @property
    def grid(self) -> Rowmajor:
        """The plan of rowmajor."""
        return Rowmajor(self.block, weighted_keys=self.row_summary == "wsum")

    def build(self, dims: Dims) -> Combiner:
        """The module."""
        return Combiner(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections, and the pairs of queries with tokens and regions and of regions with their tokens.

        A length counts as filled up to whole segments or rows. Autograd keeps, for each plan, the result and its
        log-sum-exp; what projects the keys of rows keeps the averages, both sides of the norm, and the keys.
        """
        plans, total = self.plans(), projection_cost(dims, length, dtype_bytes)
        inner, heads = dims.inner_dim, dims.num_heads
        sums = max(4, dtype_bytes) * heads * length
        kept = len(plans) * sums + (dtype_bytes * length * inner * len(plans) if len(plans) > 1 else 0)
        weights = 2 * dims.head_dim**2 if self.activation == "deepset" else 0
        products = 3 if self.row_summary == "wsum" else 0 if self.projects_rows else 2  # scores, averages
        flops = 0
        for plan in plans if length else ():
            filled = length + -length % plan.unit(length)
            attended, summarised = plan.pairs(filled, causal=dims.causal)
            flops += 2 * inner * (2 * attended + products * summarised) + 2 * filled * heads * weights
        total += Cost(flops=flops, activation_bytes=kept, parameters=weights)
        return total + self._row_projection_cost(dims, length, dtype_bytes) if self.projects_rows else total

    def _row_projection_cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        inner, width, averages = dims.inner_dim, dims.embed_dim, 2 if self.row_summary == "wsum_proj" else 1
        full, rest = divmod(length, self.block)
        sums = max(4, dtype_bytes) * length * (averages * dims.num_heads + 2)
        return Cost(
            flops=2 * 2 * inner * averages * (full * self.block**2 + rest**2) + 2 * 2 * length * inner * width,
            activation_bytes=sums + dtype_bytes * length * ((1 + averages) * inner + 2 * width),
            parameters=2 * inner * width + 2 * width + (inner + width if dims.bias else 0),
        )


class Combiner(HeadMixer):
    """Softmax attention to tokens and to summaries of regions."""

    parting = BY_HEADS
    config: CombinerConfig

    def __init__(self, config: CombinerConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        deepset, shape = config.activation == "deepset", (dims.head_dim, dims.head_dim)
        self.query_features = nn.Parameter(torch.empty(shape)) if deepset else None
        self.key_features = nn.Parameter(torch.empty(shape)) if deepset else None
        self.row_summary = RowSummary(dims) if config.projects_rows else None
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights of the features."""
        for weight in (self.query_features, self.key_features):
            if weight is not None:
                nn.init.xavier_uniform_(weight)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Attend by the plan, with the valid tokens first."""
        assert heads.k is not None
        assert heads.v is not None
        valid = heads.mask.valid
        order = valid_first(valid) if valid is not None and has_gaps(valid) else None
        if order is not None and valid is not None:
            q, k, v, x = (take(tensor, order) for tensor in (heads.q, heads.k, heads.v, heads.x[:, None]))
            heads = Heads(x[:, 0], q, k, v, Mask(take(valid, order)), Mask())
        out = self._by_plans(heads) if self.row_summary is None else self._by_rows(heads, self.row_summary)
        return (out if order is None else put_back(out, order)), None

    def _by_plans(self, heads: Heads) -> Tensor:
        config, dims = self.config, self.dims
        assert heads.k is not None
        assert heads.v is not None
        summarize = Summarize(
            config.pooling, config.activation, self.query_features, self.key_features, config.log_size_bias
        )
        found = [
            combiner_attention(
                heads.q, heads.k, heads.v, plan, causal=dims.causal, valid=heads.mask.valid, summarize=summarize
            )
            for plan in config.plans()
        ]
        return found[0] if len(found) == 1 else torch.stack(found).mean(dim=0)

    def _by_rows(self, heads: Heads, row_summary: RowSummary) -> Tensor:
        """Average rows by the queries of their tokens, and make keys of the averages."""
        assert heads.k is not None
        assert heads.v is not None
        x, q, k, v, valid = heads.x, heads.q, heads.k, heads.v, heads.mask.valid
        plan, length, kept = self.config.grid, q.shape[2], valid
        missing = 0 if self.dims.causal or not length else -length % plan.unit(length)
        if missing:
            kept = torch.ones_like(x[..., 0], dtype=torch.bool) if valid is None else valid
            kept = F.pad(kept, (0, missing))
            x, q, k, v = (F.pad(tensor, (0, 0, 0, missing)) for tensor in (x, q, k, v))
        if kept is not None:
            q = q.masked_fill(~kept[:, None, :, None], 0.0)
        rows = Block(self.config.block)
        value = pattern_attention(q, k, v, rows, key_valid=kept)
        average = value if self.config.row_summary == "proj" else pattern_attention(q, k, k, rows, key_valid=kept)
        key = self.split(row_summary(x, average.to(x.dtype).transpose(1, 2).flatten(2)))
        return combiner_attention_with_summaries(
            heads.q, heads.k, heads.v, key, value, plan, causal=self.dims.causal, valid=valid
        )


class RowSummary(nn.Module):
    """Averages of rows to keys: W₂ LayerNorm(x + W₁ average)."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.project_average = nn.Linear(dims.inner_dim, dims.embed_dim, bias=dims.bias)
        self.norm = nn.LayerNorm(dims.embed_dim)
        self.project_key = nn.Linear(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        self.dropout = nn.Dropout(dims.dropout)
        for projection in (self.project_average, self.project_key):
            initialise_projection(projection)

    def forward(self, x: Tensor, average: Tensor) -> Tensor:
        """(B, L, D) and (B, L, H * E) -> (B, L, H * E)."""
        return self.project_key(self.norm(x + self.dropout(self.project_average(average))))
