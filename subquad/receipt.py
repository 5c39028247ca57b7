"""Receipts: a written trace whenever something other than what was asked for is what ran.

A request that can be ignored without changing what is computed wrongly (global tokens for a mechanism without them), a
path other than the named one, padding that was added, tokens that were dropped: none of these raises, and none of them
happens silently. Whoever wants to know opens a `with receipts() as r:` block; training runs and profiles do, and store
what they find beside the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Receipt:
    """One difference between what was asked for and what ran, and how often it happened."""

    where: str
    asked: str
    ran: str
    reason: str
    count: int = 1


class Receipts:
    """The receipts collected inside one `with receipts()` block."""

    def __init__(self) -> None:
        self._by_content: dict[Receipt, int] = {}

    @property
    def entries(self) -> list[Receipt]:
        """Each different receipt once, in the order of first appearance, with its count."""
        return [replace(receipt, count=count) for receipt, count in self._by_content.items()]

    def add(self, receipt: Receipt) -> None:
        """Count one more occurrence of `receipt`."""
        key = replace(receipt, count=1)
        self._by_content[key] = self._by_content.get(key, 0) + receipt.count


_open_blocks: ContextVar[tuple[Receipts, ...]] = ContextVar("subquad_receipts", default=())


@contextmanager
def receipts() -> Iterator[Receipts]:
    """Collect the receipts left inside the block; nested blocks each get every receipt."""
    collected = Receipts()
    token = _open_blocks.set((*_open_blocks.get(), collected))
    try:
        yield collected
    finally:
        _open_blocks.reset(token)


@contextmanager
def muted_receipts() -> Iterator[None]:
    """A block whose receipts nobody gets: it runs again what has left them already."""
    token = _open_blocks.set(())
    try:
        yield
    finally:
        _open_blocks.reset(token)


def leave_receipt(where: str, *, asked: str, ran: str, reason: str, count: int = 1) -> None:
    """Note that `ran` happened, `count` times, where `asked` was requested; costs nothing when nobody collects."""
    for collected in _open_blocks.get():
        collected.add(Receipt(where, asked, ran, reason, count))
