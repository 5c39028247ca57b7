"""Windowed softmax attention: query i sees the keys from i - left to i + right, in time and memory linear in L.

Queries are cut into blocks; each block meets one contiguous stretch of block + left + right keys, of which a band is
visible. Extra keys, visible to queries anywhere, can join every stretch inside the same softmax.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.costs import Cost, visible_pairs
from subquad.ops.softmax import softmax_attention


def window_sides(owner: str, window: int, *, causal: bool) -> tuple[int, int]:
    """Keys to the left and to the right of a token that sees `window` keys, itself included.

    Raises:
        ValueError: a two-sided window of even size; names the two odd neighbours.
    """
    if causal:
        return window - 1, 0
    if window % 2 == 0:
        raise ValueError(
            f"{owner}: a two-sided window holds the token and equally many keys on both sides, so it must be odd; "
            f"got {window}, use {window - 1} or {window + 1}"
        )
    return (window - 1) // 2, (window - 1) // 2


class Window(NamedTuple):
    """Which keys of a sequence are visible, as facts about tokens.

    Query i stands at key column left + i; the first `left` columns precede the sequence.

    Attributes:
        left: number of keys before its own that a query sees.
        right: number of keys after it.
        key_valid: bool (B, left + L); False where nothing precedes the sequence.
        query_segments: int (B, L) or None; with key_segments, only equal ones see each other.
        key_segments: int (B, left + L) or None.
    """

    left: int
    right: int
    key_valid: Tensor
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None


class ExtraKeys(NamedTuple):
    """Keys outside the window that join its softmax.

    Attributes:
        keys: (B, H, G, E).
        values: (B, H, G, E).
        visible: bool (B, L, G).
    """

    keys: Tensor
    values: Tensor
    visible: Tensor


def window_attention_by_mask(q: Tensor, k: Tensor, v: Tensor, window: Window, extra: ExtraKeys | None = None) -> Tensor:
    """The definition, with an L x S mask. Arguments and result as in `window_attention`."""
    query_column = torch.arange(q.shape[2], device=q.device)[:, None] + window.left
    key_column = torch.arange(k.shape[2], device=q.device)
    visible = (key_column >= query_column - window.left) & (key_column <= query_column + window.right)
    visible = visible & window.key_valid[:, None, None, :]
    if window.query_segments is not None and window.key_segments is not None:
        visible = visible & (window.query_segments[:, None, :, None] == window.key_segments[:, None, None, :])
    if extra is not None:
        k, v = torch.cat((extra.keys, k), dim=2), torch.cat((extra.values, v), dim=2)
        visible = torch.cat((extra.visible[:, None], visible), dim=-1)
    return softmax_attention(q, k, v, visible)


def window_cost(length: int, left: int, right: int, inner_dim: int, dtype_bytes: int) -> Cost:
    """The price of `window_attention` beyond projected q, k and v: the pairs inside the window.

    Autograd keeps q filled up to whole blocks, and k and v with the columns before the sequence.
    """
    if not length:
        return Cost()
    left, right = min(left, length - 1), min(right, length - 1)
    columns = -length % block_size(left, right, length) + 2 * left
    return Cost(
        flops=2 * 2 * visible_pairs(length, left=left, right=right) * inner_dim,
        activation_bytes=dtype_bytes * columns * inner_dim,
    )


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: Window, extra: ExtraKeys | None = None) -> Tensor:
    """Softmax attention inside a window.

    Args:
        q: (B, H, L, E).
        k: (B, H, left + L, E).
        v: (B, H, left + L, E).
        window: its sides, and facts about the tokens.
        extra: keys that join the softmax from outside the window.

    Returns:
        (B, H, L, E); 0 for a query that sees nothing.
    """
    block = block_size(window.left, window.right, q.shape[2])
    q_blocks, length = _pad_blocks(q, block), q.shape[2]
    # Stretches and their masks are made again in the backward pass: kept, they would weigh several times k and v.
    out = checkpoint(
        _attend_blocks, q_blocks, k, v, window, extra, block, use_reentrant=False, preserve_rng_state=False
    )
    return out.flatten(2, 3)[:, :, :length]


def block_size(left: int, right: int, length: int) -> int:
    """Queries per block.

    About half the window, a power of two, so that little outside the band is computed; no more than the sequence.
    """
    half = max(1, (left + right) // 2)
    return min(max(32, min(256, 1 << (half - 1).bit_length())), max(1, length))


def _pad_blocks(x: Tensor, block: int) -> Tensor:
    """(B, H, L, E) -> (B, H, N, block, E)."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, window: Window, extra: ExtraKeys | None, block: int) -> Tensor:
    batch, blocks = q.shape[0], q.shape[2]
    k, v = (_stretches(tensor, window, blocks, block).transpose(-1, -2) for tensor in (k, v))  # (B, H, N, stretch, E)
    visible = _visible_in_stretches(window, blocks, block)
    if extra is not None:
        k, v = _prepend(extra.keys, k), _prepend(extra.values, v)
        rows = _pad_tokens(extra.visible, blocks * block).unflatten(1, (blocks, block))
        visible = torch.cat((rows, visible), dim=-1)
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k, v))  # (B * N, H, ·, E)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.flatten(0, 1)[:, None])
    return out.unflatten(0, (batch, blocks)).transpose(1, 2)


def _visible_in_stretches(window: Window, blocks: int, block: int) -> Tensor:
    """Bool (B, N, block, stretch): the band, without invalid keys and other segments."""
    stretch = window.left + block + window.right
    device = window.key_valid.device
    offset = torch.arange(stretch, device=device) - torch.arange(block, device=device)[:, None]
    band = (offset >= 0) & (offset <= window.left + window.right)
    visible = band & _stretches(window.key_valid[:, None, :, None], window, blocks, block)[:, 0]
    if window.query_segments is None or window.key_segments is None:
        return visible
    key_segments = _stretches(window.key_segments[:, None, :, None], window, blocks, block)[:, 0]
    query_segments = _pad_tokens(window.query_segments[..., None], blocks * block).unflatten(1, (blocks, block))
    return visible & (query_segments == key_segments)


def _stretches(x: Tensor, window: Window, blocks: int, block: int) -> Tensor:
    """Overlapping views: (B, H, left + L, E) -> (B, H, N, E, left + block + right), zeros behind the end."""
    missing = blocks * block + window.left + window.right - x.shape[2]
    return F.pad(x, (0, 0, 0, missing)).unfold(2, window.left + block + window.right, block)


def _pad_tokens(x: Tensor, length: int) -> Tensor:
    """(B, L, G) -> (B, length, G), zeros behind the end."""
    return F.pad(x, (0, 0, 0, length - x.shape[1]))


def _prepend(extra: Tensor, stretches: Tensor) -> Tensor:
    return torch.cat((extra[:, :, None].expand(-1, -1, stretches.shape[2], -1, -1), stretches), dim=3)
