"""Receipts: collected where someone asks, counted, nested, and free where nobody does."""

from __future__ import annotations

from threading import Thread

import pytest

from subquad import Receipt, receipts
from subquad.receipt import leave_receipt, muted_receipts


def leave(asked: str = "flex") -> None:
    leave_receipt("here", asked=asked, ran="blocked", reason="no compiler")


def test_equal_receipts_are_counted_in_order_of_first_appearance() -> None:
    with receipts() as collected:
        leave("b")
        leave("a")
        leave("b")
    assert collected.entries == [
        Receipt("here", "b", "blocked", "no compiler", 2),
        Receipt("here", "a", "blocked", "no compiler", 1),
    ]


def test_nested_blocks_each_get_every_receipt() -> None:
    with receipts() as outer:
        leave()
        with receipts() as inner:
            leave()
        leave()
    assert [receipt.count for receipt in outer.entries] == [3]
    assert [receipt.count for receipt in inner.entries] == [1]


def test_nobody_collects_outside_a_block_or_after_an_error() -> None:
    leave()
    with receipts() as outer:
        with pytest.raises(KeyError), receipts() as inner:
            raise KeyError
        leave()
    assert inner.entries == []
    assert len(outer.entries) == 1


def test_what_runs_again_leaves_no_receipt_but_can_be_asked() -> None:
    with receipts() as outer:
        with muted_receipts():
            leave()
            with receipts() as inner:
                leave()
        leave()
    assert [receipt.count for receipt in outer.entries] == [1]
    assert [receipt.count for receipt in inner.entries] == [1]


def test_a_block_belongs_to_its_own_thread() -> None:
    with receipts() as collected:
        thread = Thread(target=leave)
        thread.start()
        thread.join()
    assert collected.entries == []
