"""Seats of experts: in which groups items compete for them, and a receipt for those that find none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from subquad.ops.experts.routing import ExpertRows, expert_rows, seats
from subquad.receipt import leave_receipt

Group = Literal["batch", "sequence"]
"""What shares the seats and is to be balanced: everything of a call, or each sequence for itself."""


@dataclass(frozen=True, kw_only=True)
class Seats:
    """How items come to seats.

    Attributes:
        owner: name of the mechanism, for receipts.
        item: what is routed, for receipts: "token", for one.
        experts: X.
        group: whose items compete.
        least: seats that an expert has in any case, where they are limited.
    """

    owner: str
    item: str
    experts: int
    group: Group
    least: int

    def groups(self, items: Tensor) -> Tensor:
        """(B, N, ...) -> (G, N', ...)."""
        return items if self.group == "sequence" else items.flatten(0, 1)[None]

    def taken(
        self, chosen: Tensor, valid: Tensor | None, factor: float | None, priority: Tensor | None = None
    ) -> ExpertRows:
        """The choices that find a seat.

        Args:
            chosen: int64 (G, N, k), experts of each item.
            valid: bool (G, N); the other items take no seat.
            factor: an expert takes this many times an equal share of a group's choices; None for all that come.
            priority: (G, N), items take their seats from the largest to the smallest; None for their order. Where
                seats aren't limited nobody has to be first, and it counts for nothing.
        """
        if factor is None:
            capacity = priority = None
        else:
            items = chosen.new_full(chosen.shape[:1], chosen.shape[1]) if valid is None else valid.sum(dim=1)
            capacity = seats(items, experts=self.experts, top_k=chosen.shape[2], factor=factor, least=self.least)
        rows = expert_rows(chosen, self.experts, valid=valid, capacity=capacity, priority=priority)
        if rows.dropped:
            leave_receipt(
                self.owner,
                asked=f"an expert for every {self.item}",
                ran=f"0 for the {self.item} whose expert is full",
                reason="the expert's capacity",
                count=rows.dropped,
            )
        return rows
