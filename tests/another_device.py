"""A device that isn't the CPU, for machines that have none: what GPUs are strict about, proved without one.

Tensors `there` say that they lie on `DEVICE`; their numbers lie here, and every operation on them runs here. What a GPU
refuses is refused: tensors of both devices in one operation (but numbers, and indices from the CPU), operators of the
CPU alone, numpy. So whatever runs with the right result has made each of its tensors where its inputs lie, and taken
the way that is for every device.

Torch's own name for the device is meta, the only one that a build for CPUs knows what to do with; its tensors without
numbers are refused too. In place of FlexAttention, which pattern attention takes on a GPU, stands its definition:
attention over the pairs that a block mask lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from subquad.ops.pattern import flex

DEVICE = torch.device("meta")
HERE = torch.device("cpu")

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.copy.default)
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten._index_put_impl_.default)


class There(Tensor):
    """A tensor that says it lies on `DEVICE`.

    Attributes:
        here: its numbers.
    """

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType] - torch's way to have none

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        """A tensor around these numbers."""
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue] - no stub has it
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=DEVICE
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run here."""
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's takes its contents too
        return f"There({self.here!r})"

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_lists_there(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_lists_there(index), value)

    def tolist(self) -> Any:
        """Read the numbers."""
        return self.here.tolist()

    def item(self) -> Any:
        """Read the number."""
        return self.here.item()

    def __bool__(self) -> bool:
        return bool(self.here)

    def __int__(self) -> int:
        return int(self.here)

    def __float__(self) -> float:
        return float(self.here)

    def __index__(self) -> int:
        return self.here.__index__()


def there(x: Any) -> Any:
    """All tensors of a pytree on the device, detached; a module's parameters and buffers in place."""
    if isinstance(x, nn.Module):
        return x._apply(lambda tensor: There(tensor.detach()))
    return pytree.tree_map_only(Tensor, lambda tensor: There(tensor.detach()), x)


def here(x: Any) -> Any:
    """The numbers of all tensors of a pytree."""
    return pytree.tree_map_only(There, lambda tensor: tensor.here.detach(), x)


@contextmanager
def another_device(*, flex_limits: bool = False) -> Iterator[None]:
    """A block in which `DEVICE` can be computed on.

    Args:
        flex_limits: FlexAttention refuses float64 and narrow heads, as on a GPU; else it takes them, for exact proofs.
    """
    with ExitStack() as stack:
        for name in ("tensor", "as_tensor"):  # torch makes these behind the back of a dispatch mode
            stack.enter_context(mock.patch.object(torch, name, _maker(getattr(torch, name))))
        stack.enter_context(mock.patch("subquad.ops.pattern.attention.ON_FLEX", DEVICE.type))
        stack.enter_context(mock.patch.object(flex, "_compiled", return_value=attention_of_blocks))
        if not flex_limits:
            stack.enter_context(mock.patch.object(flex, "DTYPES", (*flex.DTYPES, torch.float64)))
            stack.enter_context(mock.patch.object(flex, "LEAST_WIDTH", 1))
        stack.enter_context(_Mode())
        yield


class _Mode(TorchDispatchMode):
    """Sees operations that make tensors, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run here."""
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation here; its result is there if its inputs or the device that it names are."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    _refuse(func, tensors, args)
    named = kwargs.get("device")
    if func in COPIES[1:]:
        result_there = isinstance(args[0], There)
    else:
        result_there = any(isinstance(x, There) for x in tensors) if named is None else torch.device(named) == DEVICE
    if named is not None:
        kwargs = kwargs | {"device": HERE}
    # A tensor that an operation gives back has to be the one that was given.
    known = {id(x.here): x for x in tensors if isinstance(x, There)}
    result = func(*pytree.tree_map_only(There, _numbers, args), **pytree.tree_map_only(There, _numbers, kwargs))
    if not result_there:
        return result.clone() if func is COPIES[0] and id(result) in known else result
    return pytree.tree_map_only(
        Tensor, lambda x: known[id(x)] if id(x) in known else There(x.resolve_conj().resolve_neg()), result
    )


def _numbers(x: There) -> Tensor:
    return x.here


def _refuse(func: Any, tensors: list[Tensor], args: Any) -> None:
    """Raise what a GPU would raise."""
    if any(x.device == DEVICE and not isinstance(x, There) for x in tensors):
        raise RuntimeError(f"{func}: a tensor without numbers")
    some_there = any(isinstance(x, There) for x in tensors)
    if some_there and ("for_cpu" in str(func) or "mkldnn" in str(func)):
        raise RuntimeError(f"{func} runs on the CPU alone")
    some_here = any(not isinstance(x, There) and x.ndim for x in tensors)
    if not (some_there and some_here) or func in COPIES:
        return
    if func not in INDEXING or not isinstance(args[0], There):
        raise RuntimeError(f"{func}: tensors on both devices")


def _lists_there(index: Any) -> Any:
    """Torch takes a list as an index by making a tensor of it."""
    if isinstance(index, tuple):
        return tuple(_lists_there(part) for part in index)
    return There(torch.tensor(index, dtype=None if index else torch.int64)) if isinstance(index, list) else index


def _maker(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor` or `torch.as_tensor`, which know the device."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(data, There) and device is None:
            return data
        device = torch.empty(0).device if device is None else torch.device(device)
        if device != DEVICE:
            return make(data, *args, device=device, **kwargs)
        return data if isinstance(data, There) else There(make(data, *args, device=HERE, **kwargs))

    return made


class _Extra(NamedTuple):
    """What FlexAttention gives besides the result."""

    lse: Tensor


def attention_of_blocks(
    q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, scale: float, return_aux: object = None
) -> Any:
    """FlexAttention by its definition."""
    device, (batch, heads, length) = q.device, q.shape[:3]
    example, head = torch.arange(batch, device=device), torch.arange(heads, device=device)
    query, key = torch.arange(length, device=device), torch.arange(k.shape[2], device=device)
    seen = block_mask.mask_mod(example[:, None, None, None], head[:, None, None], query[:, None], key)
    full = torch.zeros_like(block_mask.kv_num_blocks[..., None, None]).bool()
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _pairs(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, length, k.shape[2])
    partial = _pairs(block_mask.kv_num_blocks, block_mask.kv_indices, length, k.shape[2])
    scores = (q @ k.mT * scale).masked_fill(~(partial & seen | full), -math.inf)
    lse = scores.logsumexp(dim=-1)
    out = (scores - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None]).exp() @ v
    return out if return_aux is None else (out, _Extra(lse))


def _pairs(counts: Tensor, indices: Tensor, queries: int, keys: int) -> Tensor:
    """Bool (B or 1, H or 1, queries, keys): those in the blocks that are listed."""
    listed = torch.arange(indices.shape[3], device=indices.device) < counts[..., None]
    blocks = torch.zeros_like(indices, dtype=torch.bool).scatter_(3, indices.long(), listed)
    return blocks.repeat_interleave(flex.BLOCK, 2).repeat_interleave(flex.BLOCK, 3)[:, :, :queries, :keys]
