"""`SubquadModel`: embeddings, a stack of blocks, pooling."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from subquad.costs import Cost
from subquad.interface import ChannelMixer, FeedforwardConfig, TokenMixer
from subquad.mask import Mask
from subquad.models.axial import AxialPositions
from subquad.models.block import Block, run_blocks
from subquad.models.configuration import SubquadConfig
from subquad.models.embedding import Embedding
from subquad.models.reversible import check_reversible, run_reversibly


@dataclass
class SubquadOutput(BaseModelOutputWithPooling):
    """Output of `SubquadModel`.

    Attributes:
        last_hidden_state: (B, L, D), without the prepended vectors; 0 at invalid positions.
        pooler_output: (B, D), or None without pooling.
        hidden_states: the stream before each block and at the end, if asked for, with the prepended vectors: a global
            stream, then the one that is pooled.
        aux_loss: sum of the layers' auxiliary losses, or None.
    """

    aux_loss: Tensor | None = None


class SubquadPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving, shared by all models."""

    config_class = SubquadConfig
    config: SubquadConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers declares it without ClassVar

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__(config)
        self.supports_gradient_checkpointing = config.residual == "standard"  # the other computes again by itself

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, Embedding):
            init.normal_(module.tokens.weight)
            if isinstance(module.positions, nn.Embedding):
                init.normal_(module.positions.weight, std=0.02)
            if module.cls is not None:
                init.zeros_(module.cls)
            if module.stream is not None:
                init.normal_(module.stream)
        elif isinstance(module, AxialPositions):
            for table in module.tables:
                init.normal_(table)
        elif isinstance(module, TokenMixer | ChannelMixer):
            module.initialise()


class SubquadModel(SubquadPreTrainedModel):
    """The stack without a head.

    Args:
        config: sizes and mixers.
        add_pooling: whether to pool as `config.pooling` says; with "cls" this adds the learned vector.
    """

    def __init__(self, config: SubquadConfig, add_pooling: bool = True) -> None:
        super().__init__(config)
        self.add_pooling = add_pooling
        prepend_cls = add_pooling and config.pooling == "cls"
        self.prepended = int(prepend_cls)
        self.global_stream = config.global_stream()
        self.embedding = Embedding(config, prepend_cls=prepend_cls)
        layers = zip(config.layer_mixers(), config.layer_feedforwards(), strict=True)
        self.blocks = nn.ModuleList(
            Block(
                mixer,
                feedforward,
                config.mixer_dims(index, prepended=self.global_stream + self.prepended),
                norm=config.norm,
                feedforward_chunk=config.feedforward_chunk,
            )
            for index, (mixer, feedforward) in enumerate(layers)
        )
        if config.residual == "reversible":
            check_reversible(self.blocks)
        self.final_norm = nn.LayerNorm(config.hidden_size) if config.norm == "pre" else nn.Identity()
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
        **kwargs: Any,
    ) -> SubquadOutput:
        """Run the stack.

        Args:
            input_ids: int (B, L); or inputs_embeds.
            attention_mask: (B, L), nonzero for real tokens.
            segment_ids: int (B, L), non-decreasing; packed documents don't mix.
            global_attention_mask: (B, L), nonzero for global tokens.
            inputs_embeds: (B, L, D) instead of input_ids.
            output_hidden_states: return the stream between blocks.
            **kwargs: what trainers pass to every model, such as `num_items_in_batch`.

        Raises:
            ValueError: both or neither kind of input, a mask that a mixer refuses, or what reversible residuals can't
                do in training: a state, and the stream between blocks.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("SubquadModel: pass exactly one of input_ids and inputs_embeds")
        if self.config.residual == "reversible" and self.training and kwargs.get("past_key_values") is not None:
            raise ValueError(
                "SubquadModel: residual='reversible' can't train with a state, which it couldn't go back to; call "
                "eval() to go on from past_key_values, or train on whole sequences"
            )
        vectors = self.embedding.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = self.embedding.prepend_cls(vectors)
        mask = self._mask(x, attention_mask, segment_ids, global_attention_mask)
        x, stream_mask = self.embedding(x, mask), self._behind_global_stream(mask)
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        run = run_reversibly if self.config.residual == "reversible" else run_blocks
        x, collected, aux_loss = run(self.blocks, x, stream_mask, collect=bool(wants_states))
        x = self.final_norm(x)
        x = x if stream_mask is None else stream_mask.zero_invalid(x)
        tokens = x[:, self.global_stream :]
        return SubquadOutput(
            last_hidden_state=tokens[:, self.prepended :],
            pooler_output=_pool(tokens, mask, self.config.pooling) if self.add_pooling else None,
            hidden_states=(*collected[:-1], x) if wants_states else None,
            aux_loss=aux_loss,
        )

    def cost(self, length: int, *, dtype_bytes: int = 4) -> Cost:
        """Price of all mixers for one sequence of `length` input tokens; embeddings, norms and head are not counted.

        A parameter that layers share counts once. With reversible residuals `activation_bytes` are the two streams and
        the sublayer that keeps most, of all those that the backward pass computes again one by one; of a feed-forward
        in chunks, its input and one chunk.
        """
        prepended = self.global_stream + self.prepended
        tokens, width = length + prepended, self.config.hidden_size
        prices = []
        for index, (mixer, feedforward) in enumerate(
            zip(self.config.layer_mixers(), self.config.layer_feedforwards(), strict=True)
        ):
            prices.append(mixer.cost(self.config.mixer_dims(index, prepended=prepended), tokens, dtype_bytes))
            if feedforward is not None:
                prices.append(self._feedforward_price(feedforward, tokens, dtype_bytes))
        total = sum(prices, Cost())
        if self.config.residual == "reversible":
            streams = 2 * max(4, dtype_bytes) * tokens * width
            total = replace(total, activation_bytes=streams + max(price.activation_bytes for price in prices))
        shared = sum(self.get_parameter(name).numel() for name in self._tied_weights_keys)
        return replace(total, parameters=total.parameters - shared)

    def _feedforward_price(self, feedforward: FeedforwardConfig, tokens: int, dtype_bytes: int) -> Cost:
        width, chunk = self.config.hidden_size, self.config.feedforward_chunk
        price = feedforward.cost(width, tokens, dtype_bytes)
        if not chunk or chunk >= tokens:
            return price
        of_chunk = feedforward.cost(width, chunk, dtype_bytes).activation_bytes
        return replace(price, activation_bytes=dtype_bytes * tokens * width + of_chunk)

    def _mask(
        self, x: Tensor, attention: Tensor | None, segments: Tensor | None, global_tokens: Tensor | None
    ) -> Mask | None:
        """The mask over x, the prepended vector included, the global stream not yet."""
        shape = (x.shape[0], x.shape[1] - self.prepended)
        named = (("attention_mask", attention), ("segment_ids", segments), ("global_attention_mask", global_tokens))
        for name, given in named:
            if given is not None and tuple(given.shape) != shape:
                raise ValueError(f"SubquadModel: {name} must have shape (B, L) = {shape}, got {tuple(given.shape)}")
        valid = None if attention is None else _behind(attention != 0, self.prepended, fill=True)
        segment_ids = None if segments is None else _behind(segments, self.prepended, fill=None)
        is_global = None if global_tokens is None else _behind(global_tokens != 0, self.prepended, fill=False)
        if self.config.global_tokens == "first":
            first = _first_valid(valid, x)
            is_global = first if is_global is None else is_global | first
        if valid is None and segment_ids is None and is_global is None:
            return None
        return Mask(valid, segment_ids, is_global)

    def _behind_global_stream(self, mask: Mask | None) -> Mask | None:
        """The mask over what the mixers see."""
        if mask is None:
            return None
        valid = None if mask.valid is None else _behind(mask.valid, self.global_stream, fill=True)
        segments = None if mask.segments is None else _behind(mask.segments, self.global_stream, fill=None)
        is_global = None if mask.global_tokens is None else _behind(mask.global_tokens, self.global_stream, fill=False)
        return Mask(valid, segments, is_global)


def _behind(facts: Tensor, count: int, *, fill: bool | None) -> Tensor:
    """Facts (B, L) behind those of `count` prepended vectors: `fill`, or None to copy the first token's."""
    first = facts[:, :1] if fill is None else torch.full_like(facts[:, :1], fill)
    return torch.cat((first.expand(-1, count), facts), dim=1) if count else facts


def _first_valid(valid: Tensor | None, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1], device=x.device)
    if valid is None:
        return (places == 0).expand(x.shape[0], -1)
    return valid & (valid.cumsum(dim=1) == 1)


def _pool(x: Tensor, mask: Mask | None, pooling: str) -> Tensor:
    """One vector per example, (B, D), of x (B, L, D), whose invalid tokens are 0."""
    if pooling == "cls":
        return x[:, 0]
    if mask is None or mask.valid is None:
        return {"first": x[:, 0], "last": x[:, -1]}[pooling] if pooling != "mean" else x.mean(dim=1)
    if pooling == "mean":
        return x.sum(dim=1) / mask.valid.sum(dim=1, keepdim=True).clamp_min(1)
    places = torch.arange(x.shape[1], device=x.device)
    if pooling == "first":
        index = torch.where(mask.valid, places, x.shape[1] - 1).amin(dim=1)
    else:
        index = torch.where(mask.valid, places, 0).amax(dim=1)
    return x[torch.arange(x.shape[0], device=x.device), index]


def _tied_to_first_layer(blocks: nn.ModuleList) -> dict[str, str]:
    """Parameters that layers of equal config share: name in a later layer -> name in the first."""
    tied: dict[str, str] = {}
    first_with: dict[object, int] = {}
    for index, block in enumerate(blocks):
        assert isinstance(block, Block)
        shared = block.mixer.shared_parameters()
        first = first_with.setdefault(block.mixer.config, index) if shared else index
        if first != index:
            tied |= {f"blocks.{index}.mixer.{name}": f"blocks.{first}.mixer.{name}" for name in shared}
    return tied
