"""Tokens and positions into the stream."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from subquad.mask import Mask, holds_integers, token_positions
from subquad.models.axial import AxialPositions
from subquad.models.configuration import SubquadConfig


def sinusoid(positions: Tensor, width: int) -> Tensor:
    """Vectors of positions, int64 (...), float32 (..., width): sines in even channels, cosines in odd.

    arXiv 1706.03762, 3.5; the angles are float64, so that far positions don't coincide.
    """
    channels = torch.arange(0, width, 2, device=positions.device, dtype=torch.float64)
    angles = positions[..., None].double() * torch.exp(channels * (-math.log(10_000.0) / width))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :width].float()


class Embedding(nn.Module):
    """Token vectors plus position vectors, behind an optional learned vector for classification.

    In front of all stands the global stream of mixers that have one: learned vectors, which take no position.
    """

    def __init__(self, config: SubquadConfig, *, prepend_cls: bool) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.cls = nn.Parameter(torch.zeros(config.hidden_size)) if prepend_cls else None
        count = config.global_stream()
        self.stream = nn.Parameter(torch.zeros(count, config.hidden_size)) if count else None
        self.longest = config.max_position_embeddings + prepend_cls
        self.positions = self._learned_positions()
        self.dropout = nn.Dropout(config.dropout)

    def initialise(self) -> None:
        """Draw anew all vectors but those of axial positions, which are initialised by themselves."""
        nn.init.normal_(self.tokens.weight)
        if isinstance(self.positions, nn.Embedding):
            nn.init.normal_(self.positions.weight, std=0.02)
        if self.cls is not None:
            nn.init.zeros_(self.cls)
        if self.stream is not None:
            nn.init.normal_(self.stream)

    def forward(self, vectors: Tensor, mask: Mask | None, start: Tensor | None = None) -> Tensor:
        """Add the positions to vectors (B, L, D), the first of which may be `cls`; put the global stream before them.

        Args:
            vectors: of the tokens.
            mask: an invalid token takes no position.
            start: int64 (B,), the valid tokens before these where a stream goes on.

        Raises:
            ValueError: more tokens than learned or axial positions.
        """
        batch_size, length = vectors.shape[:2]
        positions = token_positions(mask, batch_size, length, device=vectors.device, start=start)
        if self.config.positions == "sinusoidal":
            vectors = vectors + self._sinusoids(positions, start is None).to(vectors.dtype)
        if self.positions is not None:
            self._check_reach(positions, length, start is None)
            vectors = vectors + self.positions(positions)
        if self.stream is not None:
            vectors = torch.cat((self.stream.expand(batch_size, -1, -1).to(vectors.dtype), vectors), dim=1)
        return self.dropout(vectors)

    def _sinusoids(self, positions: Tensor, from_zero: bool) -> Tensor:
        """Vectors (B, L, D) of positions below L where they count `from_zero`, of any positions otherwise."""
        width = self.config.hidden_size
        if not from_zero:
            return sinusoid(positions, width)
        return sinusoid(torch.arange(positions.shape[1], device=positions.device), width)[positions]

    def _check_reach(self, positions: Tensor, length: int, from_zero: bool) -> None:
        if from_zero and length <= self.longest:
            return
        beyond = int(positions.max()) + 1 - self.longest
        if beyond > 0:
            limit = self.config.max_position_embeddings
            raise ValueError(
                f"the input reaches {limit + beyond} tokens, but positions={self.config.positions!r} has vectors for "
                f"max_position_embeddings={limit}; raise it"
            )

    def _learned_positions(self) -> nn.Embedding | AxialPositions | None:
        if self.config.positions == "axial":
            return AxialPositions(self.config.axial_grid(self.longest), self.config.axial_pos_dropout)
        return nn.Embedding(self.longest, self.config.hidden_size) if self.config.positions == "learned" else None

    def vectors_of(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The vectors (B, L, D) of the tokens, int (B, L), or those given in their place.

        Raises:
            ValueError: both or neither, a wrong shape or dtype, or tokens outside the vocabulary.
        """
        if inputs_embeds is not None:
            if input_ids is not None:
                raise ValueError("SubquadModel: pass exactly one of input_ids and inputs_embeds, got both")
            return inputs_embeds
        if input_ids is None:
            raise ValueError("SubquadModel: pass exactly one of input_ids and inputs_embeds, got neither")
        check_tokens("input_ids", input_ids, self.tokens.num_embeddings)
        return self.tokens(input_ids)

    def prepend_cls(self, vectors: Tensor) -> Tensor:
        """(B, L, D) -> (B, L + 1, D), the learned vector in front, if there is one."""
        if self.cls is None:
            return vectors
        return torch.cat((self.cls.expand(vectors.shape[0], 1, -1).to(vectors.dtype), vectors), dim=1)


def check_tokens(name: str, tokens: Tensor, vocab_size: int) -> None:
    """Refuse what is no batch of tokens.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
    """
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"{name} must have shape (B, L) with at least one token, got {tuple(tokens.shape)}")
    if not holds_integers(tokens):
        raise ValueError(f"{name} must hold integers, got {tokens.dtype}; pass vectors as inputs_embeds")
    if tokens.numel() and not tokens.is_meta:
        smallest, largest = (int(bound) for bound in tokens.aminmax())
        if smallest < 0 or largest >= vocab_size:
            outside = smallest if smallest < 0 else largest
            raise ValueError(f"{name} must lie in 0..{vocab_size - 1} (vocab_size={vocab_size}), got {outside}")
