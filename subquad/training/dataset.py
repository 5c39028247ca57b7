"""Task data as batches: a torch dataset over a split, and the collation that pads it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from subquad.tasks.splits import LabelledSplit


class SplitDataset(Dataset[tuple[np.ndarray, int]]):
    """The examples of a split; `by_length` orders them by length, which wastes less padding in evaluation."""

    def __init__(self, split: LabelledSplit, *, by_length: bool = False) -> None:
        self.split = split
        self.order = np.argsort(split.lengths, kind="stable") if by_length else np.arange(len(split))

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        example = int(self.order[index])
        return self.split.inputs[example], int(self.split.labels[example])


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the right to its longest example.

    Attributes:
        pad_token_id: the id that fills up.
    """

    pad_token_id: int

    def __call__(self, examples: list[tuple[np.ndarray, int]]) -> dict[str, Tensor]:
        """Tensors `input_ids` and `attention_mask`, int64 (B, L), and `labels`, int64 (B,)."""
        lengths = torch.tensor([len(tokens) for tokens, _ in examples])
        input_ids = torch.full((len(examples), int(lengths.max())), self.pad_token_id)
        for row, (tokens, _) in enumerate(examples):
            input_ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": torch.tensor([label for _, label in examples]),
        }
