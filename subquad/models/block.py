"""One layer: token mixer and channel mixer, with residuals and norms as the mixer's placement asks.

In a decoder a third mixer stands between the two, whose context is the encoder's result (arXiv 1706.03762, 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from subquad.build import build_from_config
from subquad.interface import ChannelMixer, Dims, FeedforwardConfig, Mixed, MixerConfig
from subquad.mask import Mask
from subquad.models.call_buffers import CallBuffers
from subquad.state import State


class LayerStates(NamedTuple):
    """What one layer carries from call to call: the state of each token mixer, None for one that has none."""

    own: State
    cross: State | None = None


class ContextFacts(NamedTuple):
    """What there is to know of the context beside its vectors.

    Attributes:
        mask: facts about its tokens.
        in_states: whether the states of cross mixers hold it already, from an earlier call.
    """

    mask: Mask | None = None
    in_states: bool = False


NO_CONTEXT = ContextFacts()


class BlockOutput(NamedTuple):
    """The stream (B, L, D), the sum of the mixers' auxiliary losses, and the new states when states were given."""

    x: Tensor
    aux_loss: Tensor | None = None
    states: LayerStates | None = None


class Block(GradientCheckpointingLayer):
    """A layer of the stack; with a `cross_mixer`, of a decoder."""

    def __init__(
        self,
        mixer: MixerConfig,
        feedforward: FeedforwardConfig | None,
        dims: Dims,
        *,
        norm: str,
        feedforward_chunk: int = 0,
        cross_mixer: MixerConfig | None = None,
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
        self.cross_mixer = None if cross_mixer is None else build_from_config(cross_mixer, dims.of_cross_mixer())
        self.cross_norm = None if cross_mixer is None else nn.LayerNorm(dims.embed_dim)
        self.feedforward: ChannelMixer | None = None if feedforward is None else feedforward.build(dims.embed_dim)
        self.feedforward_norm = None if feedforward is None else nn.LayerNorm(dims.embed_dim)

    def forward(
        self,
        x: Tensor,
        mask: Mask | None = None,
        states: LayerStates | None = None,
        context: Tensor | None = None,
        context_facts: ContextFacts = NO_CONTEXT,
        buffers: CallBuffers | None = None,
    ) -> BlockOutput:
        """X (B, L, D) through all mixers.

        Args:
            x: the stream.
            mask: facts about the tokens of x.
            states: what `init_states` or an earlier call returned; not modified.
            context: (B, S, D), for the cross mixer.
            context_facts: what goes with the context.
            buffers: of this call, where it may be run again.
        """
        with nullcontext() if buffers is None else buffers.run():
            return self._mix(x, mask, states, context, context_facts)

    def call_buffers(self) -> CallBuffers | None:
        """What a call takes along that is checkpointed, so that it can be run again after others; else None."""
        return CallBuffers((self,)) if self.gradient_checkpointing and self.training else None

    def _mix(
        self,
        x: Tensor,
        mask: Mask | None,
        states: LayerStates | None,
        context: Tensor | None,
        context_facts: ContextFacts,
    ) -> BlockOutput:
        own = None if states is None else states.own
        mixed = self._sublayer(x, lambda stream: self.mixer(stream, mask=mask, state=own), self.mixer_norm)
        x, new_own, aux_loss = mixed
        new_cross = None
        if self.cross_mixer is not None:
            mixed = self._sublayer(
                x, lambda stream: self.cross_mix(stream, mask, states, context, context_facts), self.cross_norm
            )
            x, new_cross, aux_loss = mixed.y, mixed.state, add_losses(aux_loss, mixed.aux_loss)
        if self.feedforward is not None:
            mixed = self._sublayer(x, lambda stream: self.feed_forward(stream, mask), self.feedforward_norm)
            x, aux_loss = mixed.y, add_losses(aux_loss, mixed.aux_loss)
        return BlockOutput(x, aux_loss, None if new_own is None else LayerStates(new_own, new_cross))

    def init_states(self, batch_size: int) -> LayerStates:
        """Empty states of all token mixers that have one.

        Raises:
            ValueError: the layer's own mixer has no state.
        """
        own, cross = self.mixer.init_state(batch_size), self.cross_mixer
        if cross is None or not cross.config.traits.state:
            return LayerStates(own)
        return LayerStates(own, cross.init_state(batch_size))

    def cross_mix(
        self, x: Tensor, mask: Mask | None, states: LayerStates | None, context: Tensor | None, facts: ContextFacts
    ) -> Mixed:
        """The cross mixer on the normalised stream x (B, L, D); a state that holds the context stands for it."""
        assert self.cross_mixer is not None
        state = None if states is None else states.cross
        if state is not None and facts.in_states:
            return self.cross_mixer(x, mask=mask, state=state)
        return self.cross_mixer(x, context, mask=mask, context_mask=facts.mask, state=state)

    def _sublayer(self, x: Tensor, mix: Callable[[Tensor], Mixed], norm: nn.LayerNorm | None) -> Mixed:
        if norm is None:  # the mixer owns norm and residual
            return mix(x)
        if self.norm_first:
            mixed = mix(norm(x))
            return mixed._replace(y=x + mixed.y)
        mixed = mix(x)
        return mixed._replace(y=norm(x + mixed.y))

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
            tokens = slice(index * size, (index + 1) * size)
            of_part = None if mask is None else mask.map(lambda fact, tokens=tokens: fact[:, tokens])
            y.append(checkpoint(self._transform, part, of_part, use_reentrant=False))
        return Mixed(torch.cat(y, dim=1))

    def _transform(self, x: Tensor, mask: Mask | None) -> Tensor:
        """The feed-forward of a chunk, which has no auxiliary loss."""
        assert self.feedforward is not None
        return self.feedforward(x, mask=mask).y


def add_losses(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Sum of two auxiliary losses, either of which may be absent."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


def layers_of(blocks: nn.ModuleList) -> list[Block]:
    """The blocks of a stack, as what they are."""
    layers = [block for block in blocks if isinstance(block, Block)]
    assert len(layers) == len(blocks)
    return layers
