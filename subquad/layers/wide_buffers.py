"""Buffers that a cast of the module leaves wide: moving averages, whose steps are too small for 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn

from subquad.ops.precision import wide_dtype


class WideBuffers(nn.Module):
    """A base of modules whose floating-point buffers stay float32 or wider, whatever dtype the module is cast to.

    A cast to a narrower dtype than float32 (`module.to(torch.bfloat16)`, `module.half()`) moves them to the device
    asked for and makes float32 of them, without a rounding in between.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.is_floating_point():
                wide = wide_dtype(after)
                self._buffers[name] = after if after.dtype == wide else buffer.to(after.device, wide)
        return self
