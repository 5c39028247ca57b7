"""Linear recurrences whose queries, keys and values are convolved over the last few tokens first.

    q, k, v = silu(Σ_s w_s ⊙ (x_{t-s} W))      0 <= s < K, with taps w_s for each channel of each of the three

A mechanism derived from `ConvolvedMixer` writes `prepare`, from projections to what the recurrence takes, and
`recur_prepared`. An invalid token takes no place in the convolution: padding is taken out before it and put back behind
the recurrence. A state holds the last K - 1 tokens as they were before the convolution.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import Dims, MixerConfig
from subquad.layers.recurrent import RecurrentHeads, RecurrentMixer, RecurrentState
from subquad.mask import Mask
from subquad.ops.packing import Packing, take
from subquad.ops.precision import wide_dtype
from subquad.ops.recurrence.short_convolution import short_convolution
from subquad.state import State, state_dataclass


class Channels(NamedTuple):
    """What the convolution of queries, of keys or of values takes.

    Attributes:
        x: (B, L, C), their projection.
        taps: (K, C); None without a convolution.
        past: (B, K - 1, C), the tokens before x; None for none.
    """

    x: Tensor
    taps: Tensor | None
    past: Tensor | None


@state_dataclass
class ConvolvedState(RecurrentState):
    """The matrix, and what the convolution still sees.

    Attributes:
        length: int64 (B,).
        matrix: (B, H, E, Ev).
        recent: (B, K - 1, H * (2 E + Ev)), queries, keys and values before the convolution, the newest last.
    """

    recent: Tensor


class ConvolvedMixer(RecurrentMixer):
    """Convolves projections, and lets the recurrence go over what comes out; a final class initialises itself.

    Args:
        config: the options.
        dims: widths and form.
        heads: of the recurrence.
        kernel: K, tokens that the convolution sees; 0 for none.
    """

    def __init__(self, config: MixerConfig, dims: Dims, heads: RecurrentHeads, kernel: int) -> None:
        super().__init__(config, dims, heads)
        keys, values = dims.num_heads * heads.width, dims.num_heads * heads.value_width
        self.channels = (keys, keys, values)
        self.taps = nn.Parameter(torch.empty(kernel, sum(self.channels))) if kernel else None

    @abstractmethod
    def prepare(self, queries: Channels, keys: Channels, values: Channels) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values for the recurrence, (B, L, H * E) twice and (B, L, H * Ev)."""

    @abstractmethod
    def recur_prepared(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, state: State | None
    ) -> tuple[Tensor, RecurrentState | None]:
        """The recurrence.

        Args:
            x: (B, L, D), the stream.
            q: (B, H, L, E), float32 or wider, as k and v.
            k: (B, H, L, E).
            v: (B, H, L, Ev).
            mask: facts about the tokens.
            state: what earlier tokens left, or None.

        Returns:
            What `run_recurrence` gives.
        """

    @torch.no_grad()
    def initialise(self) -> None:
        """A gain of 1, taps as torch's convolutions have them."""
        super().initialise()
        if self.taps is not None:
            bound = self.taps.shape[0] ** -0.5
            nn.init.uniform_(self.taps, -bound, bound)

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> ConvolvedState:
        """Nothing seen yet."""
        length, matrix = self.empty_memory(batch_size, device, dtype)
        reach = 0 if self.taps is None else self.taps.shape[0] - 1
        return ConvolvedState(length, matrix, matrix.new_zeros(batch_size, reach, sum(self.channels)))

    def recur(
        self, x: Tensor, qkv: tuple[Tensor, Tensor, Tensor], mask: Mask, state: State | None
    ) -> tuple[Tensor, State | None]:
        """Convolve, then recur; padding is taken out where the convolution would see it."""
        packing = Packing(None if self.taps is None else mask.valid)
        x, q, k, v = (packing.pack(tensor) for tensor in (x, *qkv))
        qkv, mask = (q, k, v), packing.pack_mask(mask)
        before = state if isinstance(state, ConvolvedState) else None
        q, k, v = (self.split(tensor) for tensor in self.prepare(*self._channels(qkv, before)))
        out, after = self.recur_prepared(x, q, k, v, mask, state)
        out = packing.unpack(out)
        if before is None or after is None:
            return out, None
        return out, ConvolvedState(after.length, after.matrix, _newest(before.recent, qkv, mask.valid))

    def _channels(self, qkv: tuple[Tensor, Tensor, Tensor], before: ConvolvedState | None) -> list[Channels]:
        if self.taps is None:
            return [Channels(x, None, None) for x in qkv]
        taps = self.taps.split(self.channels, dim=1)
        past = [None] * 3 if before is None else before.recent.split(self.channels, dim=2)
        return [Channels(*own) for own in zip(qkv, taps, past, strict=True)]


def activate(x: Tensor, taps: Tensor | None, past: Tensor | None) -> Tensor:
    """Silu of x (B, L, C), convolved behind its past where there are taps, float32 or wider."""
    wide = wide_dtype(x)
    x, past = x.to(wide), None if past is None else past.to(wide)
    return F.silu(x if taps is None else short_convolution(x, taps.to(wide), past))


def check_kernel(owner: str, kernel: int) -> None:
    """Raise ValueError for a convolution over fewer than no tokens."""
    if kernel < 0:
        raise ValueError(f"{owner}: kernel counts the tokens of a convolution, 0 for none; got {kernel}")


def convolution_cost(dims: Dims, heads: RecurrentHeads, length: int, dtype_bytes: int, *, kernel: int) -> Cost:
    """The price of activations and convolution: autograd keeps q, k and v before them too, a state the last K - 1."""
    channels = dims.num_heads * (2 * heads.width + heads.value_width)
    return Cost(
        activation_bytes=dtype_bytes * length * channels,
        state_bytes=max(4, dtype_bytes) * max(0, kernel - 1) * channels,
        parameters=kernel * channels,
    )


def _newest(recent: Tensor, qkv: tuple[Tensor, ...], valid: Tensor | None) -> Tensor:
    """The last K - 1 valid tokens; the valid ones of this call stand in front."""
    tokens = torch.cat((recent, torch.cat(qkv, dim=2).to(recent.dtype)), dim=1)
    reach = recent.shape[1]
    if valid is None:
        return tokens[:, tokens.shape[1] - reach :]
    return take(tokens, valid.sum(dim=1, keepdim=True) + torch.arange(reach, device=valid.device))
