"""Counts what a call really costs: FLOPs by torch's counter, bytes by the tensors that autograd saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from subquad.interface import Mixed
from subquad.mechanisms import synthesizer
from subquad.ops.combiner.blocks import Blocks
from subquad.ops.memory import attention as memory_attention
from subquad.ops.memory import compressed as compressed_attention
from subquad.ops.memory import most_used
from subquad.ops.memory.attention import Distances, Slice
from subquad.ops.positions import token_product
from subquad.ops.positions.toeplitz import transform_flops
from subquad.ops.topk import attention as topk
from subquad.ops.topk.key_ranges import KeyRanges


def counted_flops(forward: Callable[[], object]) -> int:
    """FLOPs of one forward pass.

    torch's counter gives 0 to the fused attention of the CPU, to embedding bags and to Fourier transforms; here the
    first is given its *visible* pairs, read off its mask, the second its entries. Rectangles of scores and of weights
    count where they are visible.
    """
    hidden = 0

    def visible_scores(q: Tensor, k: Tensor, ranges: KeyRanges) -> Tensor:
        nonlocal hidden
        scores = topk_scores(q, k, ranges)
        hidden += 2 * int(scores.isneginf().sum()) * q.shape[-1]
        return scores

    def attend_slice(parts: Any, made_of: Any, weights: Any, visible: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal hidden
        before = counter.get_total_flops()
        out = synthesised(parts, made_of, weights, visible, k, v)
        hidden += (counter.get_total_flops() - before) * int((~visible).sum()) // visible.numel()
        return out

    def attend_memory(q: Tensor, k: Tensor, v: Tensor, distances: Distances, part: Slice) -> tuple[Tensor, Tensor]:
        nonlocal hidden
        before = counter.get_total_flops()
        result = with_memory(q, k, v, distances, part)
        rows, columns, products = q.shape[2], k.shape[2], 2 * q.shape[0] * q.shape[1] * q.shape[3]
        distance_products = rows * (rows + columns - 1)  # of which each row takes those of its visible keys
        counted = counter.get_total_flops() - before
        assert counted == products * (2 * rows * columns + distance_products)
        hidden += counted - 3 * products * int(part.visible.sum()) // part.visible.shape[0]
        return result

    def read_rows(q: Tensor, k: Tensor, v: Tensor, *of_distances: Any) -> tuple[Tensor, Tensor]:
        nonlocal hidden
        before, part = counter.get_total_flops(), of_distances[-1]
        result = of_rows(q, k, v, *of_distances)
        counted, visible = counter.get_total_flops() - before, int(part.visible.sum()) // part.visible.shape[0]
        hidden += counted - 3 * 2 * q.shape[0] * q.shape[1] * q.shape[3] * visible
        return result

    def slice_weights(q: Tensor, k: Tensor, distances: Distances, part: Slice, *rows: Any) -> Tensor:
        nonlocal hidden
        before = counter.get_total_flops()
        weights = of_usage(q, k, distances, part, *rows)
        visible = sum(int(seen.visible.sum()) // seen.visible.shape[0] for seen in (part, rows[1]) if seen is not None)
        hidden += counter.get_total_flops() - before - 2 * 2 * q.shape[0] * q.shape[1] * q.shape[3] * visible
        return weights

    def visible_product(weights: Tensor, tokens: Tensor, *, causal: bool) -> Tensor:
        nonlocal hidden
        before = counter.get_total_flops()
        rows = triangular_product(weights, tokens, causal=causal)
        if causal:
            visible = len(tokens) * (len(tokens) + 1) // 2
            hidden += counter.get_total_flops() - before - 2 * visible * tokens.shape[1]
        return rows

    def attend_blocks(
        blocks: Blocks, q: Tensor, sources: Any, out: Tensor, scale: float, scores: Tensor | None
    ) -> None:
        nonlocal hidden
        before = counter.get_total_flops()
        of_blocks(blocks, q, sources, out, scale, scores)
        given = 0 if scores is None else blocks.count * visible_in_block(blocks)
        hidden += counter.get_total_flops() - before - 2 * q.shape[0] * q.shape[2] * (2 * blocks.pairs - given)

    def score_blocks(blocks: Blocks, q: Tensor, *rest: Any) -> Tensor:
        nonlocal hidden
        not_asked = blocks.count - blocks.summarised if blocks.count > 1 else 1
        hidden += 2 * q.shape[0] * q.shape[2] * not_asked * (blocks.size**2 - visible_in_block(blocks))
        return own_scores(blocks, q, *rest)

    def visible_in_block(blocks: Blocks) -> int:
        return blocks.size * (blocks.size + 1) // 2 if blocks.causal else blocks.size**2

    topk_scores, synthesised, aten = topk.visible_scores, synthesizer.attend_slice, torch.ops.aten
    with_memory, of_rows = memory_attention.attend_slice, compressed_attention.read_rows
    of_usage, of_blocks, own_scores = most_used.slice_weights, Blocks.forward, Blocks.own_scores
    triangular_product = token_product.visible_product
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention_flops,
        aten._embedding_bag_forward_only: _embedding_bag_flops,
        aten._fft_r2c: _transform_flops,
        aten._fft_c2r: _transform_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with (
        torch.no_grad(),
        patch.object(topk, "visible_scores", visible_scores),
        patch.object(synthesizer, "attend_slice", attend_slice),
        patch.object(memory_attention, "attend_slice", attend_memory),
        patch.object(compressed_attention, "read_rows", read_rows),
        patch.object(most_used, "slice_weights", slice_weights),
        patch.object(token_product, "visible_product", visible_product),
        patch.object(Blocks, "forward", attend_blocks),
        patch.object(Blocks, "own_scores", score_blocks),
        counter,
    ):
        forward()
    return counter.get_total_flops() - hidden


def _fused_attention_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    out_val: Any = None,
) -> int:
    visible = torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)
    if is_causal:
        visible = visible.tril()
    if attn_mask is not None:
        allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > float("-inf")
        visible = visible & allowed
    return 2 * int(visible.sum()) * (q.shape[3] + v.shape[3])


def _embedding_bag_flops(table: Tensor, indices: Tensor, *options: Any, out_val: Any = None) -> int:
    weights = options[4]
    return 2 * table.shape[1] * int(weights.count_nonzero())


def _transform_flops(x: Tensor, *options: Any, out_val: Tensor) -> int:
    size = max(x.shape[-1], out_val.shape[-1])  # one of the two holds the real numbers
    return x[..., 0].numel() * transform_flops(size)


_transform_flops._get_raw = True  # pyright: ignore[reportFunctionMemberAccess] - as below
_embedding_bag_flops._get_raw = True  # pyright: ignore[reportFunctionMemberAccess] - as below
_fused_attention_flops._get_raw = True  # pyright: ignore[reportFunctionMemberAccess] - how the counter is told to pass tensors


def differentiated(mixed: Mixed) -> Tensor:
    """What a step of training differentiates: y, with the auxiliary loss where there is one."""
    return mixed.y if mixed.aux_loss is None else mixed.y.sum() + mixed.aux_loss


def saved_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the different storages that autograd saves in one forward pass, parameters and buffers not included.

    Integer and boolean facts about tokens (masks, positions) are left out: `Cost.activation_bytes` prices numbers.
    """
    own = [*module.parameters(), *module.buffers()]
    excluded = {tensor.untyped_storage().data_ptr() for tensor in own}
    saved: WeakSet[_Saved] = WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        holder = _Saved(tensor)
        saved.add(holder)
        return holder

    with saved_tensors_hooks(pack, lambda holder: holder.tensor):
        y = forward()
        kept = {holder.tensor.untyped_storage().data_ptr(): holder.tensor for holder in saved}
    assert y.requires_grad  # and alive until here, with everything its graph keeps
    numbers = {address: tensor for address, tensor in kept.items() if tensor.is_floating_point()}
    return sum(tensor.untyped_storage().nbytes() for address, tensor in numbers.items() if address not in excluded)


class _Saved:
    """Lives as long as the graph node that saved the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
