"""Retention equals its parallel form, with complex rotations and powers of γ, and its recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import masks
from hypothesis import given
from hypothesis import strategies as st
from recurrences import assert_claims_hold, assert_equals_recurrence, assert_streams_like_the_whole, in_heads, recurrent
from torch import Tensor

from subquad.build import build_mixer, cost
from subquad.layers.recurrent import RecurrentState
from subquad.mechanisms.retention import Retention

LENGTHS = st.sampled_from([1, 2, 3, 5, 9, 13])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"rotation": False, "norm": "rms", "gate": False, "value_expansion": 1},
    {"decays": (0.5, 1.0), "value_expansion": 3},
]


def retention(**options: Any) -> Retention:
    return recurrent(Retention, "retention", **options)


def gammas(mixer: Retention) -> list[float]:
    given = mixer.config.decays
    return [1 - 2.0 ** (-5 - h) for h in range(mixer.dims.num_heads)] if given is None else list(given)


def rotated(x: Tensor) -> Tensor:
    """Tokens (N, H, E) as complex numbers, pair e of token t turned by t 10000^(-e / (E/2 - 1))."""
    half = x.shape[-1] // 2
    speeds = 10_000.0 ** -torch.linspace(0, 1, half, dtype=torch.float64)
    angles = torch.arange(x.shape[0])[:, None, None] * speeds
    return torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)


def parallel(mixer: Retention, x: Tensor) -> Tensor:
    """Σ_j γ^(i - j) Re((R_i q_i) conj(R_j k_j)) / √E v_j."""
    q, k, v = (in_heads(mixer, project(x)) for project in (mixer.project_query, mixer.project_key, mixer.project_value))
    if mixer.config.rotation:
        scores = torch.einsum("ihe,jhe->hij", rotated(q), rotated(k).conj()).real
    else:
        scores = torch.einsum("ihe,jhe->hij", q, k)
    distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
    decay = torch.stack([(gamma ** distance.clamp_min(0).double()).tril() for gamma in gammas(mixer)])
    return torch.einsum("hij,jhe->ihe", scores * decay / mixer.dims.head_dim**0.5, v)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(length=LENGTHS, data=st.data())
def test_it_equals_the_parallel_form(options: dict[str, Any], length: int, data: st.DataObject) -> None:
    mask = data.draw(masks(2, length, segments=False))
    assert_equals_recurrence(retention(chunk=4, **options), parallel, length, mask)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_a_stream_in_pieces_equals_the_whole(options: dict[str, Any], pieces: list[int], data: st.DataObject) -> None:
    mask = data.draw(masks(2, sum(pieces), segments=False))
    assert_streams_like_the_whole(retention(chunk=4, **options), pieces, mask)


def test_the_state_is_the_faded_sum_of_keys_and_values() -> None:
    mixer, x = retention(rotation=False), torch.randn(1, 6, 6, dtype=torch.float64)
    k, v = (in_heads(mixer, project(x[0])) for project in (mixer.project_key, mixer.project_value))
    matrix, state = torch.zeros(2, 4, 8, dtype=torch.float64), mixer.init_state(1)
    gamma = torch.tensor(gammas(mixer), dtype=torch.float64)[:, None, None]
    for i in range(6):
        _, state, _ = mixer(x[:, i : i + 1], state=state)
        matrix = gamma * matrix + torch.einsum("he,hf->hef", k[i] / 2, v[i])
        assert isinstance(state, RecurrentState)
        torch.testing.assert_close(state.matrix[0], matrix)


def test_the_row_norms_of_the_paper_are_cancelled_by_the_group_norm() -> None:
    """Dividing decays by the root of their sum, and rows by the sum of their sizes, changes nothing but rounding."""
    mixer, x = retention(rotation=False, gate=False), 10 * torch.randn(7, 6, dtype=torch.float64)
    q, k, v = (in_heads(mixer, project(x)) for project in (mixer.project_query, mixer.project_key, mixer.project_value))
    distance = torch.arange(7)[:, None] - torch.arange(7)
    decay = torch.stack([(gamma ** distance.clamp_min(0).double()).tril() for gamma in gammas(mixer)])
    rows = torch.einsum("ihe,jhe->hij", q, k) * decay / decay.sum(dim=-1, keepdim=True).sqrt() / 2
    rows = rows / rows.abs().sum(dim=-1, keepdim=True).clamp_min(1)
    out = torch.einsum("hij,jhe->ihe", rows, v)
    normed = (out - out.mean(-1, keepdim=True)) / out.std(-1, keepdim=True, correction=0)
    torch.testing.assert_close(mixer(x[None]).y[0], mixer.project_out(normed.flatten(1)), rtol=1e-3, atol=1e-3)


def test_the_decays_are_those_of_the_paper() -> None:
    mixer = build_mixer("retention", embed_dim=16, num_heads=4, causal=True)
    assert isinstance(mixer, Retention)
    found = mixer._log_decays(torch.zeros(1, dtype=torch.float64)).exp().tolist()
    assert found == pytest.approx([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256], rel=1e-12)


def test_most_of_its_parameters_are_four_times_those_of_a_value() -> None:
    """Q and k D² each; v, gate and out 2 D² each: 8 D², as in the paper."""
    assert cost("retention", length=1, embed_dim=64, num_heads=4, causal=True).parameters == 8 * 64 * 64 + 7 * 64


def test_the_claims_of_the_contract_hold_with_other_options() -> None:
    assert_claims_hold("retention", rotation=False, norm="rms", value_expansion=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decays": (0.5, 0.0)}, r"retention: decays must lie above 0 and at most at 1, got \[0.5, 0.0\]"),
        ({"decays": (0.5,)}, "retention: decays must name one for each of 2 heads"),
        ({"value_expansion": 0}, "retention: value_expansion must be at least 1, got 0"),
        ({"chunk": 0}, "retention: chunk must be at least 1, got 0"),
        ({"head_dim": 3}, "retention: rotation needs an even head_dim, got 3; or rotation=False"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer("retention", **{"embed_dim": 8, "num_heads": 2, "causal": True, **options})
