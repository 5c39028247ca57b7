"""The receipts of the page: one row for all that say the same."""

from __future__ import annotations

import re

from synthetic_results import SPECS, profile, run

from subquad.records.schema import ReceiptRecord
from subquad.records.store import Records
from subquad.report.page import render
from subquad.report.receipts_section import merged


def few(length: int, count: int = 1) -> ReceiptRecord:
    reason = f"{length:,} queries and {length:,} keys are too few for the pattern to save anything"
    return ReceiptRecord(where="pattern_attention", asked="blocked", ran="dense", reason=reason, count=count)


def test_receipts_that_differ_in_the_length_alone_are_one_row_with_the_lengths() -> None:
    (row,) = merged([few(1_024, 2), few(64, 3), few(96)])
    assert row.reason == "64, 96 or 1,024 queries and 64, 96 or 1,024 keys are too few for the pattern to save anything"
    assert row.count == 6
    (row,) = merged([few(length) for length in range(70, 1_100, 10)])
    assert row.reason.startswith("70 to 1,090 queries and 70 to 1,090 keys are")


def test_receipts_that_say_something_else_stay_apart() -> None:
    others = [
        few(64),
        few(64).model_copy(update={"asked": "flex"}),
        few(64).model_copy(update={"reason": "on cpu"}),
        few(64).model_copy(update={"reason": "in float32"}),
        few(64).model_copy(update={"reason": "in float16"}),
        few(64).model_copy(update={"reason": "0.25 of them"}),
        few(64).model_copy(update={"reason": "0.50 of them"}),
    ]
    assert merged(others) == others


def test_the_page_has_one_row_a_mechanism_and_path() -> None:
    runs = tuple(
        run(SPECS[index], seed).model_copy(update={"receipts": tuple(few(length) for length in (32, 48 + seed))})
        for index in (0, 1)
        for seed in (0, 1)
    )
    page = render(Records(runs=runs, profiles=(profile(SPECS[1]),)))
    (section,) = re.findall(r'<section[^>]*id="receipts".*?</section>', page)
    assert section.count("<tr>") == 1 + 2 + 1  # the head, two mechanisms' lengths, and a receipt of another path
    assert section.count("32, 48 or 49 queries and 32, 48 or 49 keys") == 2
