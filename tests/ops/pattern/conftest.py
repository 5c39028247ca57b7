"""What the tests of pattern attention share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def cheap_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls priced as for wide heads, so that strips and tiles run at lengths that tests can afford."""
    monkeypatch.setattr("subquad.ops.pattern.blocked.CALL_FLOPS", 2**15)
