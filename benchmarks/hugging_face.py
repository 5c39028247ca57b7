"""Attention layers of Hugging Face transformers at their best settings, with the weights of a mixer of ours.

Training mode, no dropout, no padding, no global tokens: what a mixer computes without a mask. Their layers end before
the output projection, which belongs to another module of theirs; here it is put behind, so that both sides do the same
work.
"""

from __future__ import annotations

from typing import Any, final
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import BigBirdConfig, LongformerConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from subquad.layers.heads import HeadMixer


@final
class HuggingFaceLongformer(nn.Module):
    """`LongformerSelfAttention`; lengths are multiples of its window, which doesn't count the token itself."""

    def __init__(self, mixer: HeadMixer, *, attention_window: int) -> None:
        super().__init__()
        config = LongformerConfig(
            hidden_size=mixer.dims.embed_dim,
            num_attention_heads=mixer.dims.num_heads,
            attention_window=[attention_window],
            attention_probs_dropout_prob=0.0,
        )
        self.attention = LongformerSelfAttention(config, layer_id=0)
        self.out = nn.Linear(mixer.dims.embed_dim, mixer.dims.embed_dim)
        take_weights(mixer, self.attention, self.out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        nothing = torch.zeros(x.shape[:2], dtype=torch.bool)
        (mixed,) = self.attention(
            x,
            attention_mask=nothing.to(x.dtype),
            is_index_masked=nothing,
            is_index_global_attn=nothing,
            is_global_attn=False,
        )
        return self.out(mixed)


class Discarded:
    """Stands for a tensor that is filled and never read: it takes every assignment and keeps none."""

    device = torch.device("cpu")

    def __getitem__(self, place: object) -> Discarded:
        return self

    def __setitem__(self, place: object, value: object) -> None:
        return None

    def view(self, *shape: int) -> Discarded:
        """The same."""
        return self

    def scatter_(self, *where_and_what: object) -> Discarded:
        """Nothing is kept."""
        return self


def _discard(*shape: int, **form: Any) -> Discarded:
    return Discarded()


class BigBirdWithoutProbabilities(BigBirdBlockSparseAttention):
    """The same attention without the L x L matrix of probabilities that it fills for its second result.

    The matrix is the only tensor that the layer makes with `torch.zeros`; during the call that function gives a
    `Discarded` instead. None of their code is repeated here.
    """

    def bigbird_block_sparse_attention(self, *arguments: Any, **options: Any) -> tuple[Tensor, Any]:
        """As theirs; the second result is a `Discarded`."""
        with mock.patch.object(torch, "zeros", _discard):
            return super().bigbird_block_sparse_attention(*arguments, **options)


@final
class HuggingFaceBigBird(nn.Module):
    """`BigBirdBlockSparseAttention`; its random blocks exist in training mode only, in eval mode all are block 0."""

    def __init__(
        self, mixer: HeadMixer, *, block: int, random: int, length: int, attention: type[BigBirdBlockSparseAttention]
    ) -> None:
        super().__init__()
        config = BigBirdConfig(
            hidden_size=mixer.dims.embed_dim,
            num_attention_heads=mixer.dims.num_heads,
            block_size=block,
            num_random_blocks=random,
            max_position_embeddings=length,
            attention_probs_dropout_prob=0.0,
        )
        self.attention = attention(config, seed=0)
        self.out = nn.Linear(mixer.dims.embed_dim, mixer.dims.embed_dim)
        take_weights(mixer, self.attention, self.out)
        every_token = torch.ones(1, length)
        # Their model makes the masks once for all layers, so they are no part of a layer's time.
        self.masks = BigBirdModel.create_masks_for_block_sparse_attn(every_token, block)

    def forward(self, x: Tensor) -> Tensor:
        """(1, L, D) -> (1, L, D)."""
        blocked, band, queries, keys = self.masks
        mixed, _ = self.attention(
            x,
            band_mask=band,
            from_mask=queries,
            to_mask=keys,
            from_blocked_mask=blocked,
            to_blocked_mask=blocked,
        )
        return self.out(mixed)


def take_weights(mixer: HeadMixer, attention: nn.Module, out: nn.Linear) -> None:
    """Give a peer the projections of a mixer."""
    pairs = (
        (mixer.project_query, attention.get_submodule("query")),
        (mixer.project_key, attention.get_submodule("key")),
        (mixer.project_value, attention.get_submodule("value")),
        (mixer.project_out, out),
    )
    for ours, theirs in pairs:
        theirs.load_state_dict(ours.state_dict())
