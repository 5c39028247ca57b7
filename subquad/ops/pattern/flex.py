"""Pattern attention by FlexAttention: the pattern becomes a `mask_mod`, its tiles become a `BlockMask`.

Blocks of which nothing is visible are skipped, blocks of which everything is visible run without a mask. The block mask
has one entry for each block, made from `Pattern.tiles`; no L x S tensor exists, and dimensions for examples and heads
only where they differ.

The first call for a pattern compiles: on the CPU with a C++ compiler, on CUDA with Triton. On the CPU FlexAttention has
no backward pass, no log-sum-exp and no float64; asking for one is an error here, and `blocked` has all three. There
every shape has kernels of its own, so this suits a few fixed lengths and not decoding. The names of PyTorch that may
still change (`BlockMask`, `AuxRequest`, `flex_attention`) are used in this file alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from subquad.ops.pattern.request import Request
from subquad.patterns.bands import Causal
from subquad.patterns.pattern import Classes, MaskMod, Pattern, Tile

BLOCK = 128
"""Tokens of a block, for queries and keys alike: FlexAttention's own default."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What FlexAttention computes in."""
LEAST_WIDTH = 16
"""Of a head, for FlexAttention's kernels on GPUs."""
MOST_PATTERNS = 64
"""Patterns whose kernels and tiles are kept."""
MOST_KERNELS = 1024
"""Kernels of one pattern: one for each combination of shapes and facts on the CPU."""


def attend_flex(q: Tensor, k: Tensor, v: Tensor, request: Request, *, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Attend.

    Args:
        q: (B, H, L, E).
        k: (B, H, S, E).
        v: (B, H, S, E).
        request: checked.
        with_lse: whether the log-sum-exp is wanted; not on the CPU.

    Returns:
        out (B, H, L, E), the dtype of q, and the log-sum-exp (B, H, L), float32; None where it isn't wanted.

    Raises:
        ValueError: what FlexAttention can't do on this device, and what can.
    """
    refusal = why_not(q, k, v, with_lse=with_lse)
    if refusal:
        raise ValueError(f'backend="flex" {refusal}')
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf, dtype=torch.float32) if with_lse else None
    if q.device.type == "cpu":
        q, k, v = q.detach(), k.detach(), v.detach()  # FlexAttention looks at requires_grad even under no_grad
    attend = _compiled(request.pattern, q.device.type)
    mask = make_block_mask(q, k, request)
    if not with_lse:
        return attend(q, k, v, block_mask=mask, scale=request.scale), None
    out, extra = attend(q, k, v, block_mask=mask, scale=request.scale, return_aux=AuxRequest(lse=True))
    return out, extra.lse


def why_not(q: Tensor, k: Tensor, v: Tensor, *, with_lse: bool) -> str:
    """What FlexAttention can't do with these, as the end of a sentence with what can; "" if it can."""
    if q.dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        return f'computes in {known}, got {q.dtype}; use backend="blocked"'
    if q.device.type != "cpu":
        if q.shape[-1] >= LEAST_WIDTH:
            return ""
        return (
            f"needs heads at least {LEAST_WIDTH} wide on {q.device.type}, got {q.shape[-1]}; take fewer heads, or use "
            'backend="blocked"'
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        return (
            'has no backward pass on the CPU, but q, k or v requires a gradient; use backend="blocked", or call it '
            "under torch.no_grad()"
        )
    return 'gives no log-sum-exp on the CPU; use backend="blocked", or leave it out' if with_lse else ""


def make_block_mask(q: Tensor, k: Tensor, request: Request) -> BlockMask:
    """The block mask for q (B, H, L, E) and k (B, H, S, E); dimensions of examples and heads are 1 where all agree."""
    classes = block_classes(q, k, request)
    blocks = []
    for tile in (Tile.PARTIAL, Tile.FULL):
        chosen = classes == tile
        order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
        blocks += [chosen.sum(dim=-1, dtype=torch.int32), order.to(torch.int32)]
    return BlockMask.from_kv_blocks(
        *blocks,
        BLOCK_SIZE=BLOCK,
        mask_mod=make_mask_mod(k, request),
        seq_lengths=(q.shape[2], k.shape[2]),
    )


def make_mask_mod(k: Tensor, request: Request) -> MaskMod:
    """Pattern and facts together: whether a query of an example and head sees a key of k (B, H, S, E)."""
    pattern = _pattern_mod(request.pattern, k.shape[2], k.device)
    facts = request.facts
    causal = [request.pattern.of_head(head).causal for head in range(k.shape[1])]
    forward = torch.tensor(causal, device=k.device).logical_not()
    starts = torch.tensor(request.offsets, device=k.device) if len(request.offsets) > 1 else None
    start = request.offset(0)

    def visible(example: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = query + (start if starts is None else starts[example])
        seen = pattern(example, head, position, key)
        if facts.global_keys is not None:
            column = facts.global_keys[example, key]
            seen = seen | (column & (forward[head] | (key <= position)))
        if facts.key_valid is not None:
            seen = seen & facts.key_valid[example, key]
        if facts.query_valid is not None:
            seen = seen & facts.query_valid[example, query]
        if facts.query_segments is not None and facts.key_segments is not None:
            seen = seen & (facts.query_segments[example, query] == facts.key_segments[example, key])
        return seen

    return visible


@lru_cache(maxsize=MOST_PATTERNS)
def _pattern_mod(pattern: Pattern, keys: int, device: torch.device) -> MaskMod:
    return pattern.mask_mod(keys, device=device)


def block_classes(q: Tensor, k: Tensor, request: Request) -> Tensor:
    """`Tile` class of every block: int8 (B or 1, H or 1, blocks of queries, blocks of keys).

    As for tiles, unions take the higher class and intersections the lower one.
    """
    pattern, facts = request.pattern, request.facts
    lengths = (q.shape[2], k.shape[2])
    heads = tuple(pattern.of_head(head) for head in range(q.shape[1])) if pattern.num_heads else (pattern,)
    classes = torch.stack([_stacked(heads, offset, lengths, q.device) for offset in request.offsets])
    if facts.global_keys is not None:
        columns = _of_tokens(facts.global_keys)[:, None, None, :]
        past = torch.stack([_stacked((Causal(),), offset, lengths, q.device) for offset in request.offsets])
        forward = torch.tensor([head.causal for head in heads], device=q.device).logical_not()[:, None, None]
        columns = torch.minimum(columns, torch.where(forward, int(Tile.FULL), past))
        classes = torch.maximum(classes, columns)
    if facts.key_valid is not None:
        classes = torch.minimum(classes, _of_tokens(facts.key_valid)[:, None, None, :])
    if facts.query_valid is not None:
        classes = torch.minimum(classes, _of_tokens(facts.query_valid)[:, None, :, None])
    if facts.query_segments is not None and facts.key_segments is not None:
        classes = torch.minimum(classes, _of_segments(facts.query_segments, facts.key_segments)[:, None])
    return classes


def _stacked(heads: tuple[Pattern, ...], offset: int, lengths: tuple[int, int], device: torch.device) -> Tensor:
    """(H, blocks of queries, blocks of keys)."""
    classes = {head: _of_pattern(head, offset, lengths) for head in dict.fromkeys(heads)}
    return torch.from_numpy(np.stack([classes[head] for head in heads])).to(device)


@lru_cache(maxsize=MOST_PATTERNS)
def _of_pattern(pattern: Pattern, offset: int, lengths: tuple[int, int]) -> Classes:
    """Classes of the blocks of one head."""
    queries, keys = (np.arange(0, length, BLOCK) for length in lengths)
    last_query, last_key = (np.arange(0, length, BLOCK).clip(max=length - BLOCK) + BLOCK - 1 for length in lengths)
    resolved = pattern.resolve(lengths[1])
    classes = resolved.tiles(queries[:, None] + offset, last_query[:, None] + offset, keys[None], last_key[None])
    return np.broadcast_to(classes, (len(queries), len(keys)))


def _of_tokens(chosen: Tensor) -> Tensor:
    """Classes of the blocks of a fact about tokens, bool (B, T): int8 (B, blocks)."""
    lowest, highest = _extremes(chosen.to(torch.int8))
    return lowest + highest


def _of_segments(queries: Tensor, keys: Tensor) -> Tensor:
    """Classes where equal segments, int (B, L) and (B, S), see each other: int8 (B, blocks of queries, of keys)."""
    (query_low, query_high), (key_low, key_high) = _extremes(queries), _extremes(keys)
    overlap = (query_low[..., None] <= key_high[:, None]) & (key_low[:, None] <= query_high[..., None])
    lowest = torch.minimum(query_low[..., None], key_low[:, None])
    highest = torch.maximum(query_high[..., None], key_high[:, None])
    return overlap.to(torch.int8) + (lowest == highest).to(torch.int8)


def _extremes(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value in every block of (B, T); the last token fills the last block."""
    missing = -tokens.shape[1] % BLOCK
    filled = torch.cat((tokens, tokens[:, -1:].expand(-1, missing)), dim=1).unflatten(1, (-1, BLOCK))
    return filled.amin(dim=2), filled.amax(dim=2)


@lru_cache(maxsize=MOST_PATTERNS)
def _compiled(pattern: Pattern, device_type: str) -> Callable[..., Any]:
    """FlexAttention for one pattern: its kernels stand apart from those of others."""
    # Kernels for lengths that are known only when they run don't always compile on the CPU (names clash in the C++).
    dynamic = False if device_type == "cpu" else None
    return torch.compile(  # pyright: ignore[reportCallIssue] - the overloads of torch 2.13 don't name all arguments
        flex_attention,
        fullgraph=True,
        dynamic=dynamic,
        recompile_limit=MOST_KERNELS,
        isolate_recompiles=True,
    )
