"""`SubquadModel`: embeddings, a stack of blocks, pooling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from subquad.costs import Cost
from subquad.interface import FeedforwardConfig, MixerConfig, TokenMixer
from subquad.mask import Mask
from subquad.models.block import Block, ContextFacts, LayerStates, layers_of
from subquad.models.cache import SubquadCache, open_states
from subquad.models.configuration import SubquadConfig
from subquad.models.embedding import Embedding
from subquad.models.pooling import pool
from subquad.models.pretrained import SubquadPreTrainedModel
from subquad.models.reversible import JOINS, check_reversible, run_reversibly
from subquad.models.stack import StackInputs, run_blocks
from subquad.models.token_facts import TokenFacts, behind_prepended, context_mask


@dataclass
class SubquadOutput(BaseModelOutputWithPooling):
    """Output of `SubquadModel`.

    Attributes:
        last_hidden_state: (B, L, D), without the prepended vectors; 0 at invalid positions. Where two streams end side
            by side, 2 D stands for D here, below and in `hidden_states`.
        pooler_output: (B, D), or None without pooling.
        hidden_states: the stream before each block and at the end, if asked for, with the prepended vectors: a global
            stream, then the one that is pooled.
        past_key_values: what to go on from, if a cache was given or asked for.
        aux_loss: sum of the layers' auxiliary losses, or None.
    """

    past_key_values: SubquadCache | None = None
    aux_loss: Tensor | None = None


class SubquadModel(SubquadPreTrainedModel):
    """The stack without a head.

    Args:
        config: sizes and mixers.
        add_pooling: whether to pool as `config.pooling` says; with "cls" this adds the learned vector.
        cross_mixers: of a decoder, the mixer of each layer between decoder and encoder.
    """

    def __init__(
        self, config: SubquadConfig, add_pooling: bool = True, cross_mixers: Sequence[MixerConfig] | None = None
    ) -> None:
        super().__init__(config)
        self.add_pooling = add_pooling
        self.has_cross_mixers = cross_mixers is not None
        prepend_cls = add_pooling and config.pooling == "cls"
        self.prepended = int(prepend_cls)
        self.global_stream = config.global_stream()
        self.embedding = Embedding(config, prepend_cls=prepend_cls)
        layers = zip(
            config.layer_mixers(),
            config.layer_feedforwards(),
            cross_mixers or [None] * config.num_hidden_layers,
            strict=True,
        )
        self.blocks = nn.ModuleList(
            Block(
                mixer,
                feedforward,
                config.mixer_dims(index, prepended=self.global_stream + self.prepended),
                norm=config.norm,
                feedforward_chunk=config.feedforward_chunk,
                cross_mixer=cross_mixer,
            )
            for index, (mixer, feedforward, cross_mixer) in enumerate(layers)
        )
        if config.residual == "reversible":
            check_reversible(self.blocks)
        if config.causal and self.global_stream:
            raise ValueError(
                f"{config.layer_mixers()[0].name}: its global stream stands before the input and sees all of it, which "
                "causal=True forbids; use causal=False"
            )
        self.final_norm = nn.LayerNorm(config.output_width) if config.norm == "pre" else nn.Identity()
        self._tied_weights_keys = _tied_to_first_layer(self.blocks)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.embedding.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table."""
        assert isinstance(value, nn.Embedding)
        self.embedding.tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        encoder_segment_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> SubquadOutput:
        """Run the stack.

        Args:
            input_ids: int (B, L); or inputs_embeds.
            attention_mask: (B, L), 1 or True for real tokens; with a cache also (B, past + L), for all tokens so far.
            segment_ids: int (B, L), non-decreasing; packed documents don't mix.
            global_attention_mask: (B, L), 1 or True for global tokens.
            inputs_embeds: (B, L, D) instead of input_ids.
            output_hidden_states: return the stream between blocks.
            past_key_values: a `SubquadCache` to go on from; left as it is.
            use_cache: return a cache; None for whether one is given.
            encoder_hidden_states: (B, S, D), what the cross mixers of a decoder read.
            encoder_attention_mask: (B, S), 1 or True for real tokens of it.
            encoder_segment_ids: int (B, S), non-decreasing, which packed document each of them belongs to.
            **kwargs: what `Trainer` and `generate` pass to every model; others are refused.

        Raises:
            ValueError: both or neither kind of input, tokens outside the vocabulary, a mask that a mixer refuses, a
                cache where there can't be one or of another model, or what reversible residuals can't do in training:
                a state, and the stream between blocks.
        """
        self._refuse(kwargs, encoder_hidden_states)
        x = self.embedding.prepend_cls(self.embedding.vectors_of(input_ids, inputs_embeds))
        states = self._states(past_key_values, use_cache, x.shape[0])
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        given = TokenFacts(attention_mask, segment_ids, global_attention_mask)
        mask = self._mask(x, given, past, states)
        x = self.embedding(x, mask, None if states is None else states[0].own.length)
        whole_mask = behind_prepended(mask, self.global_stream)
        wants_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        reversible = partial(run_reversibly, join=JOINS[self.config.reversible_join])
        run = reversible if self.config.residual == "reversible" else run_blocks
        facts = ContextFacts(context_mask(encoder_attention_mask, encoder_segment_ids), in_states=past > 0)
        inputs = StackInputs(whole_mask, states, encoder_hidden_states, facts, bool(wants_hidden))
        x, collected, aux_loss, new_states = run(self.blocks, x, inputs)
        x = self._normed(x, whole_mask)
        tokens = x[:, self.global_stream :]
        keeps = use_cache or (use_cache is None and past_key_values is not None)
        return SubquadOutput(
            last_hidden_state=tokens[:, self.prepended :],
            pooler_output=pool(tokens, mask, self.config.pooling) if self.add_pooling else None,
            hidden_states=(*collected[:-1], x) if wants_hidden else None,
            past_key_values=SubquadCache(new_states, past + x.shape[1]) if keeps else None,
            aux_loss=aux_loss,
        )

    def _refuse(self, unknown: dict[str, Any], encoder_hidden_states: Tensor | None) -> None:
        self.refuse_foreign(unknown)
        if encoder_hidden_states is not None and not self.has_cross_mixers:
            raise ValueError("SubquadModel: got encoder_hidden_states, but this stack has no cross mixers to read them")

    def _normed(self, x: Tensor, whole_mask: Mask | None) -> Tensor:
        """The stream at the end, 0 at invalid positions."""
        x = self.final_norm(x)
        return x if whole_mask is None else whole_mask.zero_invalid(x)

    def _states(self, cache: Cache | None, use_cache: bool | None, batch_size: int) -> list[LayerStates] | None:
        if cache is None and not use_cache:
            return None
        if self.config.residual == "reversible" and self.training:
            raise ValueError(
                "SubquadModel: residual='reversible' can't train with a state, which it couldn't go back to; call "
                "eval() to go on from past_key_values, or train on whole sequences"
            )
        return open_states(self.blocks, cache, batch_size, prepended=self.prepended + self.global_stream)

    def _mask(self, x: Tensor, given: TokenFacts, past: int, states: Sequence[LayerStates] | None) -> Mask | None:
        """The mask over x, the prepended vector included, the global stream not yet."""
        if given.segments is not None and states is not None and self.config.positions not in ("rotary", "none"):
            raise ValueError(
                f"SubquadModel: with positions={self.config.positions!r} a position counts from the beginning of its "
                "segment, which a cache doesn't keep; pass segment_ids without a cache, or use positions='rotary'"
            )
        begins = torch.ones_like(x[:, 0, 0], dtype=torch.bool) if states is None else states[0].own.length == 0
        newest = given.newest(x.shape[0], x.shape[1] - self.prepended, past)
        return newest.mask(x, self.prepended, first_is_global=begins if self.config.global_tokens == "first" else None)

    def cost(self, length: int, *, context_length: int | None = None, dtype_bytes: int = 4) -> Cost:
        """Price of all mixers for one sequence of `length` input tokens; embeddings, norms and head are not counted.

        A parameter that layers share counts once, and so does the context, which all cross mixers keep together. With
        reversible residuals `activation_bytes` are the two streams, the context, and the sublayer that keeps most, of
        all those that the backward pass computes again one by one; of a feed-forward in chunks, its input and one
        chunk.

        Args:
            length: input tokens, without prepended ones.
            context_length: S, tokens that the cross mixers of a decoder read; None where there are no cross mixers.
            dtype_bytes: of an element of the stream.

        Raises:
            ValueError: a decoder without a context_length, or another stack with one.
        """
        if self.has_cross_mixers and context_length is None:
            raise ValueError("SubquadModel.cost: the price of a decoder depends on its source too; pass context_length")
        if context_length is not None and not self.has_cross_mixers:
            raise ValueError(
                "SubquadModel.cost: this stack has no cross mixers to read a context; leave out context_length, got "
                f"{context_length}"
            )
        width = self.config.hidden_size
        tokens = length + self.global_stream + self.prepended
        prices = self._sublayer_costs(tokens, context_length, dtype_bytes)
        total = sum(prices, Cost())
        if self.config.residual == "reversible":
            streams = 2 * max(4, dtype_bytes) * tokens * width
            total = replace(total, activation_bytes=streams + max(price.activation_bytes for price in prices))
        shared = sum(self.get_parameter(name).numel() for name in self._tied_weights_keys)
        return total + Cost(parameters=-shared, activation_bytes=dtype_bytes * (context_length or 0) * width)

    def _sublayer_costs(self, tokens: int, context_length: int | None, dtype_bytes: int) -> list[Cost]:
        prices = []
        feedforwards = self.config.layer_feedforwards()
        for index, (block, feedforward) in enumerate(zip(layers_of(self.blocks), feedforwards, strict=True)):
            dims = self.config.mixer_dims(index, prepended=self.global_stream + self.prepended)
            prices.append(block.mixer.config.cost(dims, tokens, dtype_bytes))
            if block.cross_mixer is not None:
                prices.append(block.cross_mixer.config.cost(dims.of_cross_mixer(context_length), tokens, dtype_bytes))
            if feedforward is not None:
                prices.append(self._feedforward_cost(feedforward, tokens, dtype_bytes))
        return prices

    def _feedforward_cost(self, feedforward: FeedforwardConfig, tokens: int, dtype_bytes: int) -> Cost:
        width, chunk = self.config.hidden_size, self.config.feedforward_chunk
        price = feedforward.cost(width, tokens, dtype_bytes)
        if not chunk or chunk >= tokens:
            return price
        of_chunk = feedforward.cost(width, chunk, dtype_bytes).activation_bytes
        return replace(price, activation_bytes=dtype_bytes * tokens * width + of_chunk)


def _tied_to_first_layer(blocks: nn.ModuleList) -> dict[str, str]:
    """Parameters that layers of equal config share: name in a later layer -> name in the first.

    Raises:
        ValueError: a layer that would share with none.
    """
    groups = _sharing_mixers(blocks)
    _check_sharing(groups)
    return {
        f"{place}.{name}": f"{first}.{name}"
        for (first, mixer), *others in (group.items() for group in groups.values())
        for place, _ in others
        for name in mixer.shared_parameters()
    }


def _sharing_mixers(blocks: nn.ModuleList) -> dict[tuple[str, MixerConfig], dict[str, TokenMixer]]:
    """The mixers with parameters to share, by their place in the stack; those of one slot and equal config together."""
    groups: dict[tuple[str, MixerConfig], dict[str, TokenMixer]] = {}
    for index, block in enumerate(layers_of(blocks)):
        for slot, mixer in (("mixer", block.mixer), ("cross_mixer", block.cross_mixer)):
            if mixer is not None and mixer.shared_parameters():
                groups.setdefault((slot, mixer.config), {})[f"blocks.{index}.{slot}"] = mixer
    return groups


def _check_sharing(groups: Mapping[tuple[str, MixerConfig], Mapping[str, TokenMixer]]) -> None:
    """Refuse a layer that shares with none, since all others of its mechanism have parameters of another shape."""
    shapes = {key: _shared_shapes(next(iter(mixers.values()))) for key, mixers in groups.items()}
    for (slot, config), mixers in groups.items():
        own = shapes[slot, config]
        others = {found for (at, other), found in shapes.items() if (at, other.name) == (slot, config.name)} - {own}
        (place, mixer), *_ = mixers.items()
        if len(mixers) == 1 and others:
            raise ValueError(
                f"{config.name}: its layers share {', '.join(mixer.shared_parameters())}, but in {place} the shape is "
                f"{own}, elsewhere {', '.join(sorted(others))}; give layers that share the same options, or share "
                "nothing over layers"
            )


def _shared_shapes(mixer: TokenMixer) -> str:
    return ", ".join(str(tuple(mixer.get_parameter(name).shape)) for name in mixer.shared_parameters())
