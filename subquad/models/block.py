"""One layer: token mixer and channel mixer, with residuals and norms as the mixer's placement asks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from subquad.build import build_from_config
from subquad.interface import ChannelMixer, Dims, FeedforwardConfig, Mixed, MixerConfig
from subquad.mask import Mask


class Block(GradientCheckpointingLayer):
    """A layer of the stack; returns the stream and the auxiliary loss of its mixers."""

    def __init__(
        self,
        mixer: MixerConfig,
        feedforward: FeedforwardConfig | None,
        dims: Dims,
        *,
        norm: str,
        feedforward_chunk: int = 0,
    ) -> None:
        super().__init__()
        owns_block = mixer.placement == "block"
        if owns_block and feedforward is not None:
            raise ValueError(f"{mixer.name}: owns its channel mixing; use feedforward=None with it")
        if feedforward_chunk and feedforward is not None and not feedforward.position_wise:
            raise ValueError(
                f"{feedforward.name}: doesn't promise that a token's result depends on it alone (position_wise), so "
                f"feedforward_chunk={feedforward_chunk} could change it; use feedforward_chunk=0"
            )
        self.norm_first = norm == "pre"
        self.feedforward_chunk = feedforward_chunk
        self.mixer = build_from_config(mixer, dims)
        self.mixer_norm = None if owns_block else nn.LayerNorm(dims.embed_dim)
        self.feedforward: ChannelMixer | None = None if feedforward is None else feedforward.build(dims.embed_dim)
        self.feedforward_norm = None if feedforward is None else nn.LayerNorm(dims.embed_dim)

    def forward(self, x: Tensor, mask: Mask | None = None) -> tuple[Tensor, Tensor | None]:
        """X (B, L, D) through both mixers."""
        x, mixer_loss = self._sublayer(x, lambda stream: self.mixer(stream, mask=mask), self.mixer_norm)
        if self.feedforward is None:
            return x, mixer_loss
        x, feedforward_loss = self._sublayer(x, lambda stream: self.feed_forward(stream, mask), self.feedforward_norm)
        return x, add_losses(mixer_loss, feedforward_loss)

    def _sublayer(
        self, x: Tensor, mix: Callable[[Tensor], Mixed], norm: nn.LayerNorm | None
    ) -> tuple[Tensor, Tensor | None]:
        if norm is None:  # the mixer owns norm and residual
            mixed = mix(x)
            return mixed.y, mixed.aux_loss
        if self.norm_first:
            mixed = mix(norm(x))
            return x + mixed.y, mixed.aux_loss
        mixed = mix(x)
        return norm(x + mixed.y), mixed.aux_loss

    def feed_forward(self, x: Tensor, mask: Mask | None) -> Mixed:
        """The channel mixer on the normalised stream x (B, L, D), in chunks where the model says so.

        In training a chunk is computed again in the backward pass; what autograd keeps of it is its part of x.
        """
        assert self.feedforward is not None
        size = self.feedforward_chunk
        if not size or size >= x.shape[1]:
            return self.feedforward(x, mask=mask)
        y = []
        for index, part in enumerate(x.split(size, dim=1)):
            of_part = None if mask is None else _cut(mask, index * size, (index + 1) * size)
            y.append(checkpoint(self._transform, part, of_part, use_reentrant=False))
        return Mixed(torch.cat(y, dim=1))

    def _transform(self, x: Tensor, mask: Mask | None) -> Tensor:
        """The feed-forward of a chunk, which has no auxiliary loss."""
        assert self.feedforward is not None
        return self.feedforward(x, mask=mask).y


def run_blocks(
    blocks: nn.ModuleList, x: Tensor, mask: Mask | None, *, collect: bool
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """The stream x (B, L, D) through all blocks.

    Returns:
        The stream at the end; with `collect`, the streams before each block and at the end; and the sum of the
        auxiliary losses.
    """
    collected, aux_loss = [x], None
    for block in blocks:
        x, block_loss = block(x, mask)
        aux_loss = add_losses(aux_loss, block_loss)
        if collect:
            collected.append(x)
    return x, collected, aux_loss


def add_losses(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Sum of two auxiliary losses, either of which may be absent."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _cut(mask: Mask, start: int, stop: int) -> Mask:
    fields = (mask.valid, mask.segments, mask.global_tokens)
    return Mask(*(None if field is None else field[:, start:stop] for field in fields))
