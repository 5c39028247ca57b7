"""The config of all models: sizes, and which mixer stands in each layer."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any, Literal, get_args, get_origin

from transformers import PreTrainedConfig

from subquad.build import make_dims
from subquad.byte_ids import BYTES
from subquad.config import nearest
from subquad.interface import Dims, FeedforwardConfig, MixerConfig, mixers_with
from subquad.models.axial import AxialGrid, axial_grid, check_axial_fields
from subquad.models.config_keywords import refuse_unknown
from subquad.models.written_layers import as_dict, tiled


class SubquadConfig(PreTrainedConfig):
    """Config of `SubquadModel` and the models built on it.

    Args:
        vocab_size: rows of the embedding table.
        byte_ids: whether the ids below 256 are bytes, each its own id; `subquad generate` writes with such models only.
        hidden_size: D.
        num_hidden_layers: depth.
        num_attention_heads: H.
        head_dim: E; None for D / H.
        intermediate_size: F, hidden width of the feed-forward and of the classification head.
        mixer: the token mixer: a name, `{"name": "local", "window": 129}`, or a list of these tiled over depth.
        feedforward: the channel mixer, in the same forms; None with mixers that own theirs.
        cross_mixer: the mixer between decoder and encoder, in the same forms.
        encoder_layers: depth of the encoder in encoder-decoder models; None for `num_hidden_layers`.
        encoder_mixer: the token mixer of the encoder in encoder-decoder models, in the same forms, where `mixer` is the
            decoder's; None for the same.
        encoder_feedforward: the channel mixer of that encoder, in the same forms; None for the same, `[None]` for none.
        positions: sinusoidal, learned or axial vectors added to the embeddings, rotary queries and keys, or none.
        axial_pos_shape: sides of the grid of axial positions, whose product is the number of positions; None for the
            smallest that is nearly square and holds all.
        axial_pos_embds_dim: channels that each side describes, D in all; None for an even division.
        axial_pos_dropout: rate at which, in training, whole rows and whole columns of the grid lose their vectors.
        norm: layer norm before ("pre", with a final one) or after ("post") each sublayer.
        residual: "standard", or "reversible": two streams, and memory for activations that doesn't grow with the depth.
        reversible_join: how the two streams become the last hidden state: their mean, their sum, or both side by side
            ("concat"), of width 2 D, as in the official code of the Reformer. Heads are then as wide; one tied to the
            token vectors can't be, nor can an encoder that cross mixers read.
        feedforward_chunk: tokens that pass the feed-forward at a time; 0 for all. In training they pass it twice.
        loss_chunk: in training, tokens of a sequence whose logits a language head makes at a time, and again in the
            backward pass; given labels it then returns the loss alone, no logits. 0 for all tokens, and all logits.
        pooling: "cls" prepends a learned vector and pools there; "first", "last": that valid token; "mean": over them.
            The vectors of a global stream are never pooled.
        causal: each token sees itself and the past only.
        global_tokens: "first" asks for the first valid token to be global.
        max_position_embeddings: longest input of learned positions and of mixers with parameters per position.
        pad_token_id: id of padding.
        bos_token_id: id of the beginning of a text.
        eos_token_id: id of its end, where generation stops.
        decoder_start_token_id: the first token that a decoder reads; None for `bos_token_id`, and without that for
            `pad_token_id`.
        pair_features: what a classifier of pairs reads of the two vectors u, v: "interaction" for [u, v, u * v, u - v],
            "concat" for [u, v].
        tie_word_embeddings: one matrix for the token vectors and the weights of the language head.
        bias: whether the mixers' projections have biases.
        dropout: rate on embeddings and on the output of every sublayer.
    """

    model_type = "subquad"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers declares it without ClassVar

    vocab_size: int = 257
    byte_ids: bool = False
    hidden_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    head_dim: int | None = None
    intermediate_size: int = 2048
    mixer: str | dict | list = "full"
    feedforward: str | dict | list | None = "mlp"
    cross_mixer: str | dict | list = "full"
    encoder_layers: int | None = None
    encoder_mixer: str | dict | list | None = None
    encoder_feedforward: str | dict | list | None = None
    positions: Literal["sinusoidal", "learned", "axial", "rotary", "none"] = "sinusoidal"
    axial_pos_shape: list[int] | None = None
    axial_pos_embds_dim: list[int] | None = None
    axial_pos_dropout: float = 0.0
    norm: Literal["pre", "post"] = "pre"
    residual: Literal["standard", "reversible"] = "standard"
    reversible_join: Literal["mean", "sum", "concat"] = "mean"
    feedforward_chunk: int = 0
    loss_chunk: int = 0
    pooling: Literal["cls", "first", "mean", "last"] = "cls"
    causal: bool = False
    global_tokens: Literal["none", "first"] = "none"
    max_position_embeddings: int = 4096
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None
    pair_features: Literal["interaction", "concat"] = "interaction"
    bias: bool = True
    dropout: float = 0.0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Check names, ranges and choices.

        Raises:
            ValueError: naming the field, what was expected and what was got.
        """
        refuse_unknown(type(self), kwargs, saved=self.transformers_version is not None)
        super().__post_init__(**kwargs)
        for field, choices in _choices().items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"SubquadConfig: {field}={value!r} is not supported; {nearest(str(value), choices)}")
        positive = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings")
        for field in positive:
            if getattr(self, field) < 1:
                raise ValueError(f"SubquadConfig: {field} must be at least 1, got {getattr(self, field)}")
        if self.byte_ids and self.vocab_size < BYTES:
            raise ValueError(f"SubquadConfig: byte_ids=True needs vocab_size >= {BYTES}, got {self.vocab_size}")
        for field in ("feedforward_chunk", "loss_chunk"):
            if getattr(self, field) < 0:
                raise ValueError(f"SubquadConfig: {field} must not be negative, got {getattr(self, field)}")
        if self.feedforward_chunk and not self._has_feedforwards():
            raise ValueError(
                f"SubquadConfig: feedforward_chunk={self.feedforward_chunk} says how many tokens pass a feed-forward "
                "at a time, and no layer has one; leave it out, or name a feedforward"
            )
        if self.residual == "reversible" and self.norm == "post":
            raise ValueError(
                "SubquadConfig: residual='reversible' needs norm='pre'; a norm after the sum couldn't be taken back"
            )
        if self.reversible_join != "mean" and self.residual != "reversible":
            raise ValueError(
                f"SubquadConfig: reversible_join={self.reversible_join!r} joins the two streams of "
                f"residual='reversible', got residual={self.residual!r}; leave it out, or use reversible residuals"
            )
        if self.positions == "axial":
            self.axial_grid(self.max_position_embeddings)
        check_axial_fields(self.positions, self.axial_pos_shape, self.axial_pos_embds_dim, self.axial_pos_dropout)

    def _has_feedforwards(self) -> bool:
        """Whether any layer has a channel mixer, of the encoder or of the stack that is there in every model."""
        depth = self.num_hidden_layers
        stacks = (self.feedforward, depth), (self.encoder_feedforward, self.encoder_layers or depth)
        return any(layer is not None for written, depth in stacks for layer in tiled(written, depth, "feedforward"))

    def axial_grid(self, places: int) -> AxialGrid:
        """The grid of axial positions for so many `places`.

        Raises:
            ValueError: sides or channels that don't fit.
        """
        return axial_grid(
            places=places, width=self.hidden_size, shape=self.axial_pos_shape, dims=self.axial_pos_embds_dim
        )

    @property
    def output_width(self) -> int:
        """Channels of the last hidden state, which heads read: D, or 2 D where two streams end side by side."""
        return self.hidden_size * (2 if self.reversible_join == "concat" else 1)

    def with_changes(self, **changes: Any) -> SubquadConfig:
        """A copy with other values in these fields."""
        changed = copy.deepcopy(self)
        for field, value in changes.items():
            setattr(changed, field, value)
        return changed

    def of_encoder(self) -> SubquadConfig:
        """Config of the encoder of an encoder-decoder model.

        Raises:
            ValueError: a mixer that sees the past only; an encoder wider than what the cross mixers read.
        """
        if self.output_width != self.hidden_size:
            raise ValueError(
                f"SubquadConfig: reversible_join={self.reversible_join!r} makes an encoder's result "
                f"{self.output_width} wide, and the decoder's cross mixers read vectors of hidden_size="
                f"{self.hidden_size}; use reversible_join='mean' or 'sum'"
            )
        config = self.with_changes(
            mixer=self.mixer if self.encoder_mixer is None else self.encoder_mixer,
            feedforward=self.feedforward if self.encoder_feedforward is None else self.encoder_feedforward,
            num_hidden_layers=self.num_hidden_layers if self.encoder_layers is None else self.encoder_layers,
            causal=False,
            is_encoder_decoder=False,
        )
        unable = sorted({mixer.name for mixer in config.layer_mixers() if not mixer.traits.bidirectional})
        if unable:
            raise ValueError(
                f"{', '.join(unable)}: sees the past only, and an encoder reads both sides; keep it as the decoder's "
                f"mixer, and choose encoder_mixer among {', '.join(mixers_with('bidirectional'))}"
            )
        return config

    def of_decoder(self) -> SubquadConfig:
        """Config of the decoder of an encoder-decoder model.

        Raises:
            ValueError: a mixer without a causal form.
        """
        config = self.with_changes(causal=True, is_encoder_decoder=False)
        unable = sorted({mixer.name for mixer in config.layer_mixers() if not mixer.traits.causal})
        if unable:
            raise ValueError(
                f"{', '.join(unable)}: has no causal form, and a decoder sees the past only; use it as encoder_mixer, "
                f"and choose mixer, the decoder's, among {', '.join(mixers_with('causal'))}"
            )
        return config

    def layer_mixers(self) -> list[MixerConfig]:
        """The mixer of each layer.

        Raises:
            ValueError: unknown name or option.
        """
        written = tiled(self.mixer, self.num_hidden_layers, "mixer")
        return [MixerConfig.from_dict(as_dict(layer, "mixer")) for layer in written]

    def layer_cross_mixers(self) -> list[MixerConfig]:
        """The cross mixer of each layer of a decoder.

        Raises:
            ValueError: unknown name or option.
        """
        written = tiled(self.cross_mixer, self.num_hidden_layers, "cross_mixer")
        return [MixerConfig.from_dict(as_dict(layer, "cross_mixer")) for layer in written]

    def layer_feedforwards(self) -> list[FeedforwardConfig | None]:
        """The channel mixer of each layer, with this config's width and dropout where the layer names none.

        Raises:
            ValueError: unknown name or option.
        """
        common = {"hidden_dim": self.intermediate_size, "dropout": self.dropout}
        layers: list[FeedforwardConfig | None] = []
        for layer in tiled(self.feedforward, self.num_hidden_layers, "feedforward"):
            written = None if layer is None else {**common, **as_dict(layer, "feedforward")}
            layers.append(None if written is None else FeedforwardConfig.from_dict(written))
        return layers

    def global_stream(self) -> int:
        """Vectors that the model prepends because its mixers have a global stream; 0 for most.

        Raises:
            ValueError: layers that want different numbers.
        """
        wanted = {mixer.prepended_tokens: mixer.name for mixer in reversed(self.layer_mixers())}
        if len(wanted) > 1:
            found = ", ".join(f"{name} {count}" for count, name in sorted(wanted.items()))
            raise ValueError(
                "SubquadConfig: the model prepends one global stream for all layers, so their mixers must agree on its "
                f"tokens (num_global); got {found}"
            )
        return next(iter(wanted))

    def mixer_dims(self, layer: int, *, prepended: int = 0) -> Dims:
        """Dims of the mixer of a layer, where `prepended` tokens stand before the input."""
        return make_dims(
            embed_dim=self.hidden_size,
            num_heads=self.num_attention_heads,
            head_dim=self.head_dim,
            causal=self.causal,
            max_length=self.max_position_embeddings + prepended,
            positions="rotary" if self.positions == "rotary" else "none",
            bias=self.bias,
            dropout=self.dropout,
            layer=layer,
            num_global=1 if self.global_tokens == "first" else 0,
            owner="SubquadConfig",
        )


@cache
def _choices() -> dict[str, tuple[str, ...]]:
    """The values that a field may have, for each field with a list of them."""
    annotations = inspect.get_annotations(SubquadConfig, eval_str=True)
    return {name: get_args(annotation) for name, annotation in annotations.items() if get_origin(annotation) is Literal}
