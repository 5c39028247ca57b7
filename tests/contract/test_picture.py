"""The picture of who attends whom is read off the mechanism and shows its form."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cases import form_of

from subquad.benchmark.attention_picture import attention_picture, attention_strength
from subquad.benchmark.probes import offered_forms
from subquad.build import list_mixers, make_dims, mixer_config
from subquad.interface import Dims

DIMS = make_dims(embed_dim=64, num_heads=4)
CASES = [
    pytest.param(name, dims, id=f"{name}-{form_of(dims)}")
    for name in list_mixers()
    for dims in offered_forms(mixer_config(name), DIMS)
]


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_every_token_depends_on_itself_and_on_nothing_forbidden(name: str, dims: Dims) -> None:
    picture = attention_picture(mixer_config(name), dims, 20)
    assert [len(row) for row in picture] == [20] * 20
    if not dims.cross:
        assert all(picture[i][i] for i in range(20))
    if dims.causal:
        assert not any(picture[i][j] for i in range(20) for j in range(i + 1, 20))


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_strengths_are_relative_to_the_largest_of_their_row(name: str, dims: Dims) -> None:
    strength = attention_strength(mixer_config(name), dims, 12)
    assert all(max(row) == 1 and min(row) >= 0 for row in strength)


def test_the_picture_of_a_window_is_a_band() -> None:
    window = mixer_config("local", window=5)
    assert attention_picture(window, DIMS, 9) == [[abs(i - j) <= 2 for j in range(9)] for i in range(9)]
    causal = attention_picture(window, replace(DIMS, causal=True), 9)
    assert causal == [[0 <= i - j < 5 for j in range(9)] for i in range(9)]


def test_windows_are_shrunk_for_a_picture_unless_told_otherwise() -> None:
    wide = mixer_config("local", window=129)
    assert sum(map(sum, attention_picture(wide, DIMS, 16))) < 16 * 16
    assert sum(map(sum, attention_picture(wide, DIMS, 16, shrink=False))) == 16 * 16


def test_a_picture_needs_a_token() -> None:
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        attention_picture(mixer_config("local"), DIMS, 0)
