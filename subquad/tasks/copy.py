"""Copy: say the source again.

    source   7 2 9 9 4
    target   7 2 9 9 4 <end>

Of a decoder it asks that cross-attention go forward through the source at the same pace as the output. Shift-invariant
positions are enough, and no content is compared. Guessing the most frequent token is right for little more than one in
`symbols`. The sequences are those of `symbol_sequences`.
"""

from __future__ import annotations

from typing import ClassVar

from subquad.tasks.splits import Ragged
from subquad.tasks.symbol_sequences import SequenceTask


class CopyTask(SequenceTask):
    """The target is the source; see the module."""

    name: ClassVar[str] = "copy"

    def targets(self, sources: Ragged) -> Ragged:
        """The sources themselves."""
        return sources
