"""Task data as batches: a torch dataset over a split in an order, and the collation that pads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from subquad.tasks.splits import SplitT
from subquad.training.order import Order, Visit

Example = Mapping[str, np.ndarray]
"""What the model is called with for one example: int64 arrays, (length,) or 0-dim, by the name of the argument."""

BEFORE = "before"
"""Beside the model's arguments: tokens of its document that a row held before, from whose state it goes on."""

_MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


class SplitDataset(Dataset[Example], Generic[SplitT]):
    """The examples of a split, in an order.

    Args:
        split: the examples.
        order: which of them stands where.
        make: makes one of them what the model is called with.
    """

    def __init__(self, split: SplitT, order: Order, make: Callable[[SplitT, Visit], Example]) -> None:
        self.split, self.order, self.make = split, order, make

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Example:
        visit = self.order[place]
        return {**self.make(self.split, visit), BEFORE: np.asarray(visit.before)}


@dataclass(frozen=True)
class Collator:
    """Stacks examples; sequences are padded on the right to the longest.

    Attributes:
        fills: what each sequence is padded with, by the name of the argument.
    """

    fills: Mapping[str, int]

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Tensors by name, (B, L) or (B,); attention masks, int64 (B, L), only where there is padding."""
        batch: dict[str, Tensor] = {}
        for name in examples[0]:
            arrays = [example[name] for example in examples]
            if arrays[0].ndim == 0:
                batch[name] = torch.from_numpy(np.stack(arrays))
                continue
            batch[name], mask = padded(arrays, self.fills[name])
            if name in _MASKS and mask is not None:
                batch[_MASKS[name]] = mask
        return batch


def padded(arrays: Sequence[np.ndarray], fill: int) -> tuple[Tensor, Tensor | None]:
    """Arrays of different lengths as int64 (B, L), and where they are real, int64 (B, L); None where they all are."""
    lengths = torch.tensor([len(array) for array in arrays])
    length = int(lengths.max())
    rows = torch.full((len(arrays), length), fill)
    for row, array in zip(rows, arrays, strict=True):
        row[: len(array)] = torch.from_numpy(array.astype(np.int64, copy=False))
    if bool((lengths == length).all()):
        return rows, None
    return rows, (torch.arange(length) < lengths[:, None]).long()
