"""Reverse: say the source backwards.

    source   7 2 9 9 4
    target   4 9 9 2 7 <end>

Of a decoder it asks that cross-attention begin at the end of the source, whose place differs by example, and go back
while the output goes forward: the distance between an output and its source changes at every step, which windows and
fixed strides don't follow. The sequences are those of `symbol_sequences`.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from subquad.tasks.splits import Ragged
from subquad.tasks.symbol_sequences import SequenceTask


class ReverseTask(SequenceTask):
    """The target is the source backwards; see the module."""

    name: ClassVar[str] = "reverse"

    def targets(self, sources: Ragged) -> Ragged:
        """Every source from its end to its beginning."""
        ends = np.repeat(sources.offsets[:-1] + sources.offsets[1:] - 1, sources.lengths)
        return Ragged(sources.values[ends - np.arange(len(sources.values))], sources.offsets)
