"""LogSparse: softmax attention at distances that double, with queries and keys from a convolution.

Li et al. 2019, "Enhancing the Locality and Breaking the Memory Bottleneck of Transformer on Time Series Forecasting",
arXiv:1907.00235, sections 4.1 and 4.2.

    o_i = softmax over i - j in {0, 1, 2, 4, 8, ...} of q_i · k_j / √E            bidirectional: |i - j| likewise
    local: i - j < n or i - j = n - 1 + 2^m                                       restart: (i - j) mod R likewise
    kernel: q_i = Σ_s W_s x_{i-s}, 0 <= s < K; k_i likewise, values pointwise     bidirectional: centred on i

Cost O(L log L D), with restart O(L² log R D / R) for fixed R, which stays O(L log L D) where R grows with L, as in the
paper. About log L layers reach everything. State: the keys and values of all tokens, and the last K - 1 inputs.

Departures: the paper has only the causal form; the bidirectional one is its mirror image. The published code makes the
first rows dense, leaves out the newest key of the last range where that is short, and derives the length of the window
from that of a range; here every row follows the rule above, and the window is an option. The ranges of `restart` are
counted back from the query, as there. Distances count valid tokens: an invalid token takes no position, in the
convolution neither. A convolution sees zeros beyond the ends of a document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.layers.cache import KeyValueCache, attend_cached, empty_cache
from subquad.layers.heads import HeadMixer, Heads, attention_cost, projection_cost
from subquad.mask import Mask, continue_segments, token_positions
from subquad.ops.packing import Packing, take
from subquad.ops.pattern.attention import pattern_attention
from subquad.ops.projection import project
from subquad.ops.rotary import rotate
from subquad.patterns.doubling import DoublingDistances
from subquad.patterns.pattern import Pattern
from subquad.registry import register
from subquad.state import State, state_dataclass


@register("logsparse")
@dataclass(frozen=True, kw_only=True)
class LogSparseConfig(MixerConfig):
    """Options of LogSparse attention."""

    family: ClassVar[str] = "sparse"

    local: int = 1
    """n, keys that end with the token itself, all of which it sees before the distances double; the paper: log L."""
    restart: int | None = None
    """R, after how many tokens, counted back from each token, the distances start anew; None for never."""
    kernel: int = 1
    """K, width of the convolution that makes queries and keys; 1 for a projection, odd unless causal."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.local < 1:
            raise ValueError(f"logsparse: local counts the nearest keys, the token's own included; got {self.local}")
        if self.restart is not None and self.restart < 1:
            raise ValueError(
                f"logsparse: restart counts the tokens of a range and must be at least 1, got {self.restart}; None "
                "never starts anew"
            )
        if self.kernel < 1:
            raise ValueError(
                f"logsparse: kernel counts the tokens that make a query, itself included; got {self.kernel}"
            )

    @property
    def traits(self) -> Traits:
        """No cross-attention: distances need one order for queries and keys."""
        return Traits(bidirectional=True, causal=True, padding=True, segments=True, state=True)

    def check(self, dims: Dims) -> None:
        """A two-sided convolution is centred, hence odd."""
        if not dims.causal and self.kernel % 2 == 0:
            raise ValueError(
                "logsparse: a bidirectional convolution is centred on the token, so that kernel must be odd; got "
                f"{self.kernel}, use {self.kernel - 1} or {self.kernel + 1}"
            )

    def pattern(self, *, causal: bool) -> DoublingDistances:
        """Who sees whom."""
        return DoublingDistances(self.local, self.restart, not causal)

    def build(self, dims: Dims) -> LogSparse:
        """The module."""
        return LogSparse(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections, two of them once for each token under the kernel, and the visible pairs."""
        further = 2 * (self.kernel - 1) * dims.embed_dim * dims.inner_dim
        stored = 2 * length * dims.inner_dim + (self.kernel - 1) * dims.embed_dim if dims.causal else 0
        own = Cost(
            flops=2 * length * further,
            state_bytes=stored * max(4, dtype_bytes),
            parameters=further,
        )
        pairs = self.pattern(causal=dims.causal).pairs(length)
        return projection_cost(dims, length, dtype_bytes) + attention_cost(dims, length, pairs, dtype_bytes) + own


class Convolution(nn.Module):
    """A convolution over tokens, in two steps: what every token gives to the outputs near it, and their sums.

    So the sums can leave out what crosses the border of a document, and autograd keeps x alone.
    """

    def __init__(self, dims: Dims, kernel: int) -> None:
        super().__init__()
        self.dims, self.kernel = dims, kernel
        self.weight = nn.Parameter(torch.empty(dims.num_heads, kernel, dims.head_dim, dims.embed_dim))
        self.bias = nn.Parameter(torch.zeros(dims.inner_dim)) if dims.bias else None
        self.initialise()

    def initialise(self) -> None:
        """Xavier-uniform weights, as the projections have, and zero biases."""
        bound = (6 / (self.kernel * (self.dims.embed_dim + self.dims.inner_dim))) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """What each token of x (B, L, D) gives to K outputs, the latest last: (B, L, H * K * E)."""
        return project(x, self.weight.flatten(0, 2))

    def add_up(self, shares: Tensor, segments: Tensor | None) -> Tensor:
        """The outputs (B, H, L, E) from shares (B, H, L, K * E); `segments` (B, L) don't mix."""
        length, ahead = shares.shape[2], 0 if self.dims.causal else (self.kernel - 1) // 2
        parts = shares.unflatten(-1, (self.kernel, -1))
        total = torch.zeros_like(parts[..., 0, :])
        for part, behind in enumerate(range(-ahead, self.kernel - ahead)):
            shift = max(-length, min(behind, length))
            moved = F.pad(parts[..., part, :], (0, 0, shift, -shift))
            if segments is not None:
                source = (torch.arange(length, device=segments.device) - shift).clamp(0, length - 1)
                same = segments == segments[:, source]
                moved = moved.masked_fill(~same[:, None, :, None], 0.0)
            total = total + moved
        return total if self.bias is None else total + self.bias.view(self.dims.num_heads, 1, -1)


@state_dataclass
class ConvolutionCache(KeyValueCache):
    """All tokens so far, and what the next tokens' convolutions reach.

    Attributes:
        length: int64 (B,).
        keys: (B, H, T, E).
        values: (B, H, T, E).
        segments: int64 (B, T).
        inputs: (B, K - 1, D), of the last tokens, the newest in the last column; zeros before the first.
    """

    inputs: Tensor

    def last_segments(self) -> Tensor:
        """The segments, int64 (B, K - 1), of the tokens of `inputs`; before the first, any."""
        if not self.segments.shape[1]:
            return self.length.new_zeros(self.inputs.shape[:2])
        columns = self.length[:, None] + torch.arange(-self.inputs.shape[1], 0, device=self.length.device)
        return take(self.segments, columns.clamp_min(0))


class LogSparse(HeadMixer):
    """Attention at distances that double."""

    config: LogSparseConfig

    def __init__(self, config: LogSparseConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        if config.kernel > 1:
            self.project_query = Convolution(dims, config.kernel)
            self.project_key = Convolution(dims, config.kernel)

    def initialise(self) -> None:
        """The convolutions."""
        for projection in (self.project_query, self.project_key):
            if isinstance(projection, Convolution):
                projection.initialise()

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> KeyValueCache:
        """An empty cache, with room for the inputs of a convolution."""
        empty, reach = empty_cache(self.dims, batch_size, device, dtype), self.config.kernel - 1
        if not reach:
            return empty
        inputs = torch.zeros(batch_size, reach, self.dims.embed_dim, device=device, dtype=dtype)
        return ConvolutionCache(empty.length, empty.keys, empty.values, empty.segments, inputs)

    def rotate_heads(
        self, q: Tensor, k: Tensor | None, mask: Mask | None, key_mask: Mask | None, state: State | None
    ) -> tuple[Tensor, Tensor | None]:
        """Only what is no convolution, whose sums come later, when padding has been taken out."""
        return super().rotate_heads(q, k, mask, key_mask, state) if self.config.kernel == 1 else (q, k)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Attend; padding is taken out first, so that it takes no position."""
        pattern = self.config.pattern(causal=self.dims.causal)
        if isinstance(state, ConvolutionCache):
            return self._continue(heads, pattern, state)
        if isinstance(state, KeyValueCache):
            return attend_cached("logsparse", heads, pattern, state)
        k, v = heads.keys_and_values()
        q, mask = heads.q, Mask(heads.mask.valid, heads.mask.segments)
        packing = Packing(mask.valid)
        q, k, v, mask = *(packing.pack(tensor) for tensor in (q, k, v)), packing.pack_mask(mask)
        q, k = self._convolve(self.project_query, q, mask), self._convolve(self.project_key, k, mask)
        out = pattern_attention(q, k, v, pattern, mask=mask)
        return packing.unpack(out), None

    def _continue(self, heads: Heads, pattern: Pattern, before: ConvolutionCache) -> tuple[Tensor, ConvolutionCache]:
        """Convolve behind the stored inputs, then attend to the stored keys; padding is taken out first."""
        k, v = heads.keys_and_values()
        x, q, mask = heads.x, heads.q, Mask(heads.mask.valid, heads.mask.segments)
        packing = Packing(mask.valid)
        x, q, k, v, mask = *(packing.pack(tensor) for tensor in (x, q, k, v)), packing.pack_mask(mask)
        earlier = before.last_segments()
        segments = continue_segments("logsparse", earlier[:, -1], before.length, mask, q.shape[2])
        joined, inputs = torch.cat((earlier, segments), dim=1), before.inputs.to(x.dtype)
        q, k = (
            self._convolve_behind(inputs, projection, shares, joined, before.length)
            for projection, shares in ((self.project_query, q), (self.project_key, k))
        )
        out, cache = attend_cached("logsparse", Heads(x, q, k, v, mask, mask), pattern, before)
        columns = (cache.length - before.length)[:, None] + torch.arange(inputs.shape[1], device=x.device)
        newest = take(torch.cat((inputs, x), dim=1), columns).to(before.inputs.dtype)
        after = ConvolutionCache(cache.length, cache.keys, cache.values, cache.segments, newest)
        return packing.unpack(out), after

    def _convolve_behind(
        self, inputs: Tensor, projection: nn.Module, shares: Tensor, segments: Tensor, start: Tensor
    ) -> Tensor:
        """The sums of a convolution (B, H, L, E) whose first tokens also reach the inputs (B, K - 1, D) before them."""
        assert isinstance(projection, Convolution)
        joined = torch.cat((self.split(projection(inputs)), shares), dim=2)
        x = projection.add_up(joined, segments)[:, :, inputs.shape[1] :]
        if self.dims.positions == "none":
            return x
        return rotate(x, token_positions(None, x.shape[0], x.shape[2], device=x.device, start=start))

    def _convolve(self, projection: nn.Module, x: Tensor, mask: Mask) -> Tensor:
        """The sums of a convolution, rotated; what comes from a projection is ready."""
        if not isinstance(projection, Convolution):
            return x
        x = projection.add_up(x, mask.segments)
        if self.dims.positions == "none":
            return x
        return rotate(x, token_positions(mask, x.shape[0], x.shape[2], device=x.device))
