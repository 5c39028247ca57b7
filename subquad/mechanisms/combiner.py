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

State: a key and a value of each whole region that is seen again, and queries, keys and values, for fixed and rowmajor
of the open segment or row (with its inputs where keys are projected), for the other plans of all tokens. A region is
summarised once, when it is whole; the columns of vertical are longer regions in every row, and are summarised as often.

Departures: the paper's bidirectional logsparse and grid plans stand in an appendix; here they are its regions without
the restriction to the past. The official code drops a level of logsparse where L - 1 is a power of two, counts the own
segment twice in its bidirectional form, takes running sums where the paper has maxima, needs whole segments and
ignores padding. A plan called axial there is rowmajor here. The neighbour of logsparse is a region of one token in the
paper, which is the same without an activation. Learned regions are not offered, nor dropout inside summaries. Segments
and rows count valid tokens: an invalid token takes no position. A token missing at the end of the last row asks, in
bidirectional rowmajor, with a query and key of 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import Comparison, Dims, MixerConfig, Traits
from subquad.layers.combiner_stream import CombinerState, advance, empty_stream, stream_bytes
from subquad.layers.heads import BY_HEADS, HeadMixer, Heads, projection_cost
from subquad.layers.row_summary import RowAverage, RowSummary, row_summary_cost
from subquad.mask import Mask
from subquad.ops.combiner.attention import combiner_attention, combiner_attention_with_summaries
from subquad.ops.combiner.grid import Horizontal, Rowmajor, Vertical
from subquad.ops.combiner.joint_mixture import JointMixture
from subquad.ops.combiner.levels import Logsparse
from subquad.ops.combiner.plans import Fixed, Plan
from subquad.ops.combiner.stream import Members, Sights
from subquad.ops.combiner.summarize import Summarize
from subquad.ops.packing import Packing
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
        """The joint mixture looks back alone; with single tokens for regions, or none, it is softmax."""
        none = self.block == 1 and self.plan in ("vertical", "horizontal", "mixture")  # a column has no regions
        single = (self.plan, self.block) in (("fixed", 1), ("rowmajor", 1), ("horizontal", 2))
        softmax = none or (single and self.activation == "identity" and not self.projects_rows)
        both = self.mixture != "joint"
        return Traits(bidirectional=both, causal=True, padding=True, state=True, approximates_softmax=softmax)

    @property
    def projects_rows(self) -> bool:
        """Whether regions get their keys by projections."""
        return self.row_summary in ("proj", "wsum_proj")

    @property
    def row_average(self) -> RowAverage:
        """Which averages are projected to keys, where these are."""
        return "keys" if self.row_summary == "wsum_proj" else "values"

    def comparison(self, dims: Dims, length: int) -> Comparison:
        """Nothing is left out, but what is learned is random."""
        del dims, length
        learned = self.projects_rows or self.activation == "deepset"
        return Comparison(self, note="What summarises regions is random until it is trained." if learned else "")

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

        A length counts as filled up to whole segments or rows. Autograd keeps, where a plan merges parts, the result
        and its log-sum-exp.
        """
        plans, total = self.plans(), projection_cost(dims, length, dtype_bytes)
        inner, heads = dims.inner_dim, dims.num_heads
        sums = max(4, dtype_bytes) * heads * length
        results = dtype_bytes * length * inner * len(plans) if len(plans) > 1 else 0
        kept = sum(plan.merges_parts for plan in plans) * sums + results
        weights = 2 * dims.head_dim**2 if self.activation == "deepset" else 0
        products = 3 if self.row_summary == "wsum" else 0 if self.projects_rows else 2  # scores, averages
        flops = 0
        for plan in plans if length else ():
            filled = length + -length % plan.unit(length)
            attended, summarised, shared = plan.pairs(filled, causal=dims.causal)
            own = 0 if self.projects_rows else shared
            flops += 2 * inner * (2 * attended + products * summarised - own) + 2 * filled * heads * weights
        inputs = dims.embed_dim if self.projects_rows else 0
        state_bytes = stream_bytes(dims, inputs, self.sights, length, max(4, dtype_bytes)) if dims.causal else 0
        total += Cost(flops=flops, activation_bytes=kept, state_bytes=state_bytes, parameters=weights)
        if not self.projects_rows:
            return total
        return total + row_summary_cost(dims, length, dtype_bytes, self.block, self.row_average)

    @property
    def sights(self) -> Sights:
        """The plans, token by token."""
        return Sights([plan.stream for plan in self.plans()])


class Combiner(HeadMixer):
    """Softmax attention to tokens and to summaries of regions."""

    parting = BY_HEADS
    config: CombinerConfig

    def __init__(self, config: CombinerConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        deepset, shape = config.activation == "deepset", (dims.head_dim, dims.head_dim)
        self.query_features = nn.Parameter(torch.empty(shape)) if deepset else None
        self.key_features = nn.Parameter(torch.empty(shape)) if deepset else None
        self.row_summary = RowSummary(dims, config.block, config.row_average) if config.projects_rows else None
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights of the features."""
        for weight in (self.query_features, self.key_features):
            if weight is not None:
                nn.init.xavier_uniform_(weight)

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> CombinerState:
        """Nothing seen yet."""
        width = self.dims.embed_dim if self.config.projects_rows else 0
        return empty_stream(self.dims, width, batch_size, device, dtype)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Attend by the plan, with the valid tokens first."""
        packing = Packing(heads.mask.valid)
        x, q, k, v = (packing.pack(tensor) for tensor in (heads.x, heads.q, *heads.keys_and_values()))
        heads = Heads(x, q, k, v, Mask(packing.valid), Mask())
        if isinstance(state, CombinerState):
            out, state = self._continue(heads, state)
        else:
            out = self._attend_whole(heads)
        return packing.unpack(out), state

    def _attend_whole(self, heads: Heads) -> Tensor:
        return self._by_plans(heads) if self.row_summary is None else self._by_rows(heads, self.row_summary)

    def _continue(self, heads: Heads, before: CombinerState) -> tuple[Tensor, CombinerState]:
        """Attend to what is stored too, and store; a stream begins with all its tokens at once."""
        x = heads.x if self.config.projects_rows else heads.x[..., :0]
        seen = advance(before, heads, x, self.config.sights, partial(self._summarise_members, x.dtype))
        after = seen.next_state()
        if before.begun:
            return seen.attend(heads.q, self.config.log_size_bias), after
        return self._attend_whole(heads), after

    def _summarise_members(self, dtype: torch.dtype, members: Members) -> tuple[Tensor, Tensor]:
        """Keys and values of regions; two plans whose mean is taken make them alike."""
        if self.row_summary is not None:
            return self.row_summary.summarise_members(members, dtype)
        return self.config.plans()[0].region_summary.summarise_members(members, self._summarize)

    @property
    def _summarize(self) -> Summarize:
        config, weights = self.config, (self.query_features, self.key_features)
        return Summarize(config.pooling, config.activation, *weights, config.log_size_bias)

    def _by_plans(self, heads: Heads) -> Tensor:
        config, dims = self.config, self.dims
        k, v = heads.keys_and_values()
        found = [
            combiner_attention(
                heads.q, k, v, plan, causal=dims.causal, valid=heads.mask.valid, summarize=self._summarize
            )
            for plan in config.plans()
        ]
        return found[0] if len(found) == 1 else torch.stack(found).mean(dim=0)

    def _by_rows(self, heads: Heads, row_summary: RowSummary) -> Tensor:
        """Attend to rows through the keys that are made of their averages."""
        k, v = heads.keys_and_values()
        keys, values = row_summary.summarise(heads.x, heads.q, k, v, heads.mask.valid)
        args, valid = (heads.q, k, v, keys, values, self.config.grid), heads.mask.valid
        log_size = self.config.log_size_bias
        return combiner_attention_with_summaries(*args, causal=self.dims.causal, valid=valid, log_size=log_size)
