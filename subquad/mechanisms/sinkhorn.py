"""Sinkhorn: attention inside blocks, each of which also sees a block that a learned, soft permutation sorts to it.

Tay et al. 2020, "Sparse Sinkhorn Attention", arXiv:2002.11296.

    s_u = W₂ relu(W₁ Σ_{i in block u} x_i + b₁) + b₂        one row of scores of all blocks, for each head
    P   = exp(Sinkhorn((s + g) / τ))                        K̃_u = Σ_v P_uv K_v,  Ṽ_u = Σ_v P_uv V_v
    o_i = softmax attention of q_i, in block u, to the keys [K_u; K̃_u] and values [V_u; Ṽ_u]

    sort_cut = n: all queries see the first n sorted blocks and nothing else

Cost O(L B D + L² D / B) with blocks of B tokens: mixing N = L / B blocks into N takes N² products of blocks, a small
part below L = 100 B or so. With `sort_cut` O(L n B D + L n D), and the scores, N² numbers for each head, in all forms.

causal: s_u is made of the tokens up to the first one of block u, P_uv is 0 unless v < u, and block 0 sees a learned
null key in place of a sorted block.

State, of the causal form: all keys and values, the sum of all tokens, the block sorted to the open one, and for each
iteration and block the logarithm of a column's sum, on which later rows of P depend. A row is made with the first token
of its block.

Departures: the paper normalises the columns of the causal P over all rows, so that a row depends on blocks of the
future; here over the rows up to it, which is causal exactly. The paper's formula adds the scores of own and sorted
keys, the author's code in Long Range Arena the results of two softmaxes, other code joins the keys in one softmax:
`combine`. (That code in Long Range Arena also cuts blocks by index modulo N and sorts by default with one softmax over
rows; a popular implementation sorts keys where it should sort values.) Gumbel noise g is an option, drawn in training
only, in a stream anew for the blocks that begin in a call. Blocks count valid tokens, and blocks without any are left
out of the sorting, so that padding has no effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from subquad.calls import check_stream_length
from subquad.costs import Cost
from subquad.interface import Comparison, Dims, MixerConfig, Traits
from subquad.layers.heads import HeadMixer, Heads, initialise_projection, projection_cost
from subquad.layers.projection import Projection
from subquad.layers.sinkhorn_stream import Known, SinkhornState, empty_stream
from subquad.mask import Mask
from subquad.ops.packing import Packing
from subquad.ops.precision import full_precision, wide_dtype
from subquad.ops.sorted_blocks.attention import NullKey, SortedBlocks, sorted_block_attention, sorted_cut_attention
from subquad.ops.sorted_blocks.sorting import BlockScores, Sorting, block_descriptors, later_rows, sorting_logits
from subquad.ops.sorted_blocks.stream import Arrivals, attend_arrivals
from subquad.registry import register
from subquad.state import State


@register("sinkhorn")
@dataclass(frozen=True, kw_only=True)
class SinkhornConfig(MixerConfig):
    """Options of Sparse Sinkhorn Attention."""

    family: ClassVar[str] = "sparse"

    block: int = 64
    """B, tokens of a block."""
    iterations: int = 8
    """K, times that the sorting matrix is normalised, rows and then columns (5 to 10 in practice)."""
    temperature: float = 0.75
    """τ; towards 0 the matrix becomes a permutation."""
    noise: bool = False
    """Gumbel noise on the scores in training."""
    combine: Literal["joint", "sum", "logits"] = "joint"
    """Own and sorted keys in one softmax; in two, whose results are added; or with their scores and values added."""
    sort_cut: int | None = None
    """n, the first sorted blocks, which alone are seen, by all queries; None for own and sorted block."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.block < 1:
            raise ValueError(f"sinkhorn: block counts the tokens of a block and must be at least 1; got {self.block}")
        if self.iterations < 1:
            raise ValueError(
                "sinkhorn: iterations counts normalisations of the sorting matrix and must be at least 1; "
                f"got {self.iterations}"
            )
        if not self.temperature > 0:
            raise ValueError(f"sinkhorn: temperature must be greater than 0, got {self.temperature}")
        if self.sort_cut is not None and self.sort_cut < 1:
            raise ValueError(
                f"sinkhorn: sort_cut counts sorted blocks and must be at least 1, or None; got {self.sort_cut}"
            )

    @property
    def traits(self) -> Traits:
        """Bound to a maximal length, since the network scores each possible block; cut, it sees the whole sequence."""
        causal = self.sort_cut is None
        return Traits(bidirectional=True, causal=causal, padding=True, state=causal, fixed_length=True)

    def comparison(self, dims: Dims, length: int) -> Comparison:
        """Nothing is left out, but what is learned is random."""
        del dims, length
        return Comparison(self, note="The network that sorts blocks is random until it is trained.")

    def build(self, dims: Dims) -> Sinkhorn:
        """The module."""
        return Sinkhorn(self, dims)

    def most_blocks(self, dims: Dims) -> int:
        """M, blocks of the longest input."""
        return -(-dims.longest_input // self.block)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections, the network, mixing blocks, and attention.

        Autograd keeps, besides what the projections keep, the sums of blocks, the hidden layer, and the log-sum-exp
        of each row where there is one softmax; with `sort_cut` also the sorted blocks.
        """
        count, wide = -(-length // self.block), max(4, dtype_bytes)
        weights = dims.embed_dim**2 + dims.num_heads * self.most_blocks(dims) * dims.embed_dim
        biases = dims.embed_dim + dims.num_heads * self.most_blocks(dims)
        network = count * dims.embed_dim * (dims.embed_dim + dims.num_heads * count)
        places = count if self.sort_cut is None else min(count, self.sort_cut)
        mixing = 2 * places * count * self.block * dims.inner_dim
        sorted_tokens = places * self.block if count > 1 else length
        cut = 0 if self.sort_cut is None else 2 * sorted_tokens * dims.inner_dim
        lse = 0 if self.sort_cut is None and self.combine == "sum" else wide * dims.num_heads * length
        return projection_cost(dims, length, dtype_bytes) + Cost(
            flops=2 * (network + mixing) + 2 * 2 * self._pairs(dims, length) * dims.inner_dim,
            activation_bytes=dtype_bytes * (2 * count * dims.embed_dim + cut) + lse,
            state_bytes=wide * self._state_numbers(dims, length) if dims.causal else 0,
            parameters=weights + biases + (2 * dims.inner_dim if dims.causal else 0),
        )

    def _state_numbers(self, dims: Dims, length: int) -> int:
        columns = max(0, -(-length // self.block) - 1)
        sums = dims.embed_dim + dims.num_heads * self.iterations * columns
        return 2 * (length + self.block) * dims.inner_dim + sums

    def _pairs(self, dims: Dims, length: int) -> int:
        """Visible pairs of a query and an own or sorted key."""
        whole, rest = divmod(length, self.block)
        if self.sort_cut is not None:
            blocks = min(self.sort_cut, whole + (rest > 0))
            return length * (blocks * self.block if length > self.block else length)
        others = self.block if whole or dims.causal else rest
        if self.combine == "logits":
            if dims.causal:
                return whole * self.block * (self.block + 1) // 2 + rest * (rest + 1) // 2
            return whole * self.block**2 + rest * others
        own = [size * (size + 1) // 2 if dims.causal else size**2 for size in (self.block, rest)]
        return whole * (own[0] + self.block**2) + own[1] + rest * others


class Sinkhorn(HeadMixer):
    """Attention to the own block and a sorted one."""

    config: SinkhornConfig

    def __init__(self, config: SinkhornConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.describe = Projection(dims.embed_dim, dims.embed_dim)
        self.score = Projection(dims.embed_dim, dims.num_heads * config.most_blocks(dims))
        for projection in (self.describe, self.score):
            initialise_projection(projection)
        shape = (dims.num_heads, dims.head_dim)
        self.null_key = nn.Parameter(torch.empty(shape)) if dims.causal else None
        self.null_value = nn.Parameter(torch.empty(shape)) if dims.causal else None
        self.initialise()

    def initialise(self) -> None:
        """A null key and value of the scale of others."""
        for null in (self.null_key, self.null_value):
            if null is not None:
                nn.init.normal_(null)

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> SinkhornState:
        """Nothing seen yet."""
        return empty_stream(self.dims, self.config.block, self.config.iterations, batch_size, device, dtype)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Sort and attend, never narrowed by autocast; padding is taken out first, so that it takes no position."""
        packing = Packing(heads.mask.valid)
        x, q, k, v = (packing.pack(tensor) for tensor in (heads.x, heads.q, *heads.keys_and_values()))
        valid = packing.valid
        form = self._form()
        with full_precision(q.device):
            if isinstance(state, SinkhornState):
                out, state = self._continue(Heads(x, q, k, v, Mask(valid), Mask(valid)), form, state)
            else:
                out = self._attend_sorted(x, q, k, v, form, valid)
        return packing.unpack(out), state

    def _attend_sorted(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, form: SortedBlocks, valid: Tensor | None
    ) -> Tensor:
        x = x.to(self.score.weight.dtype)
        blocks = self._scores(block_descriptors(x, form.block, causal=self.dims.causal))
        if self.config.sort_cut is not None:
            return sorted_cut_attention(q, k, v, blocks, form, self.config.sort_cut, valid=valid)
        return sorted_block_attention(q, k, v, blocks, form, null=self._null, valid=valid)

    def _continue(self, heads: Heads, form: SortedBlocks, before: SinkhornState) -> tuple[Tensor, SinkhornState]:
        """Attend to what is stored too, and store; a stream begins with all its tokens at once."""
        x, q, k, v, valid = heads.x, heads.q, heads.k, heads.v, heads.mask.valid
        assert k is not None
        assert v is not None
        assert self._null is not None
        known = self._known(heads, form, before)
        if bool(before.length.any()):
            other = known.sorted(before, self._null)
            queries = q.to(known.own[0].dtype)
            out = attend_arrivals(queries, known.own, other, known.arrivals, form.combine)
        else:
            known = known.last_alone()
            other = known.sorted(before, self._null)
            out = self._attend_sorted(x, q, k, v, form, valid)
        return out, known.next_state(before, other)

    def _known(self, heads: Heads, form: SortedBlocks, before: SinkhornState) -> Known:
        x, valid = heads.x, heads.mask.valid
        k, v = heads.keys_and_values()
        added = torch.full_like(before.length, x.shape[1]) if valid is None else valid.sum(dim=1)
        arrivals = Arrivals(before.length, before.length + added, x.shape[1], form.block)
        check_stream_length("sinkhorn", arrivals.end, self.dims.max_length)
        x = x.to(wide_dtype(self.score.weight))
        earlier, numbers = before.input_sum.to(x.dtype), arrivals.new_blocks()
        blocks = self._scores(arrivals.descriptors(earlier, x).to(self.score.weight.dtype))
        logits = sorting_logits(blocks, form.sorting, min(arrivals.capacity, self.config.most_blocks(self.dims)))
        rows, sums = later_rows(logits, numbers, arrivals.opened, before.column_sums)
        wide = wide_dtype(k)
        own = arrivals.join(before.keys, k.to(wide)), arrivals.join(before.values, v.to(wide))
        return Known(arrivals, earlier + x.sum(dim=1), numbers, rows, sums, own)

    @property
    def _null(self) -> NullKey | None:
        if self.null_key is None or self.null_value is None:
            return None
        return NullKey(self.null_key, self.null_value)

    def _scores(self, descriptors: Tensor) -> BlockScores:
        """The network, up to the product that would have a number for each pair of blocks."""
        hidden = self.describe(descriptors).relu()
        shape = (self.dims.num_heads, -1)
        return BlockScores(hidden, self.score.weight.unflatten(0, shape), self.score.bias.unflatten(0, shape))

    def _form(self) -> SortedBlocks:
        """The options; in training with the seed of new noise, from torch's generator."""
        seed = int(torch.randint(2**62, ())) if self.training and self.config.noise else None
        sorting = Sorting(self.config.iterations, self.config.temperature, self.dims.causal, seed)
        return SortedBlocks(self.config.block, sorting, self.config.combine)
