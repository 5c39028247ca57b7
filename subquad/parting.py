"""How a mixer can be shared out among processes, told by its linear layers.

Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism",
arXiv:1909.08053, section 3.

    y = W₂ f(W₁ x) + b₂ = Σ over processes p of W₂[:, p] f(W₁[p] x) + b₂

holds where each part of f's result depends on that part of W₁ x alone: for a feed-forward where f is elementwise, for
attention where a part is some whole heads, and each head is the same function of its own queries, keys and values.
"""

from __future__ import annotations

from typing import NamedTuple


class Parting(NamedTuple):
    """The linear layers of a mixer that is a sum of parts; it has no other parameters.

    Attributes:
        columns: names of those that read the mixer's input; a process computes some of their outputs.
        rows: names of those that sum up to the mixer's result; a process has the inputs that it computed.
        between: names of the dropout modules between them, whose numbers differ by process.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    between: tuple[str, ...] = ()
