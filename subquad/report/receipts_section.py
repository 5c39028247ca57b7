"""The section of receipts: where something else ran than was asked for.

Receipts of one mechanism that say the same but for their numbers, such as one a length, are one row with all of them.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from subquad.records import units
from subquad.records.queries import mixer_key, mixer_labels, receipts_of
from subquad.records.schema import ReceiptRecord
from subquad.records.store import Records
from subquad.report.html import Html, element
from subquad.report.palette import Ink
from subquad.report.widgets import card, heading_cells, name_cell, table

MOST_LISTED = 4
"""So many different numbers are listed; of more, the smallest and the largest stand for all."""
_NUMBER = re.compile(r"(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|\d+)(?!\w|[.,]\d)")
"""A whole number by itself: no part of a name such as float32, and no fraction."""


def receipts_section(records: Records, chosen: dict[str, Ink]) -> Html:
    """Return the section."""
    labels, rows = mixer_labels(records), []
    for key, label in sorted(labels.items(), key=lambda item: item[1]):
        mine = [r for r in (*records.runs, *records.profiles) if mixer_key(r.mixer) == key]
        for receipt in merged(receipts_of(mine)):
            texts = (receipt.where, receipt.asked, receipt.ran, receipt.reason, units.count(receipt.count))
            rows.append(element("tr", name_cell(chosen[key], label), *[element("td", text) for text in texts]))
    intro = "Wherever something else ran than was asked for: another path, padding added, tokens dropped."
    head = heading_cells(["Mechanism", "Where", "Asked", "Ran", "Reason", "Times"])
    body = table(head, rows, class_="text") if rows else element("p", "None: everything ran as asked.", class_="note")
    return card(element("h2", "Receipts"), element("p", intro, class_="facts"), body, id_="receipts")


def merged(receipts: Iterable[ReceiptRecord]) -> list[ReceiptRecord]:
    """Return receipts that differ in numbers alone as one, their counts added up, in the order of the first."""
    alike: dict[tuple[str, ...], list[ReceiptRecord]] = defaultdict(list)
    for receipt in receipts:
        alike[tuple(_NUMBER.sub("#", text) for text in _texts(receipt))].append(receipt)
    found = []
    for group in alike.values():
        where, asked, ran, reason = (_joined(texts) for texts in zip(*map(_texts, group), strict=True))
        count = sum(receipt.count for receipt in group)
        found.append(ReceiptRecord(where=where, asked=asked, ran=ran, reason=reason, count=count))
    return found


def _texts(receipt: ReceiptRecord) -> tuple[str, str, str, str]:
    return receipt.where, receipt.asked, receipt.ran, receipt.reason


def _joined(texts: Sequence[str]) -> str:
    """One text for several that differ in numbers alone: in each place of a number, all of them."""
    places = zip(*([match.group() for match in _NUMBER.finditer(text)] for text in texts), strict=True)
    numbers = iter([_listed(place) for place in places])
    return _NUMBER.sub(lambda _: next(numbers), texts[0])


def _listed(numbers: Iterable[str]) -> str:
    distinct = sorted(set(numbers), key=lambda number: int(number.replace(",", "")))
    if len(distinct) > MOST_LISTED:
        return f"{distinct[0]} to {distinct[-1]}"
    *others, last = distinct
    return f"{', '.join(others)} or {last}" if others else last
