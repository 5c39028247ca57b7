"""Text as bytes: the data of the training program, in the ids of `subquad.byte_ids`.

A batch is a function of seed and step alone, so that a run that was interrupted, or goes on with another number of
processes, reads what it would have read.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from subquad.byte_ids import MASK_TOKEN_ID
from subquad.labels import IGNORED


class ByteText:
    """Files behind one another, as one text.

    Args:
        files: read as bytes, in this order.
        length: L, bytes of an example.

    Raises:
        ValueError: no file, or less text than an example.
        OSError: a file that can't be read.
    """

    def __init__(self, files: Sequence[Path], *, length: int) -> None:
        text = b"".join(path.read_bytes() for path in files)
        if len(text) < length:
            raise ValueError(
                f"{len(files)} files have {len(text)} bytes of text, but an example has {length}; name more text, or "
                "choose a smaller length"
            )
        self.bytes = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
        self.length = length

    def examples(self, count: int, *, seed: int, step: int) -> Tensor:
        """Ids (count, L) of pieces of the text, from anywhere."""
        generator = torch.Generator().manual_seed(_mixed(seed, step))
        starts = torch.randint(len(self.bytes) - self.length + 1, (count, 1), generator=generator)
        return self.bytes[starts + torch.arange(self.length)].long()


def masked(ids: Tensor, *, share: float, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Hide a share of the bytes, at least one in each example.

    Args:
        ids: (B, L).
        share: of bytes hidden.
        seed: of the run.
        step: of the run.

    Returns:
        The ids with the mask's in their place, and labels (B, L): the ids that were hidden, elsewhere `IGNORED`.
    """
    generator = torch.Generator().manual_seed(_mixed(seed, step) + 1)
    scores = torch.rand(ids.shape, generator=generator)
    hidden = (scores < share) | (scores == scores.amin(dim=1, keepdim=True))
    return ids.masked_fill(hidden, MASK_TOKEN_ID), ids.masked_fill(~hidden, IGNORED)


def standard_library() -> list[Path]:
    """Python's own sources, without packages: a text that is always there."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def _mixed(seed: int, step: int) -> int:
    """A seed of its own for each step."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> np.uint64(2))
