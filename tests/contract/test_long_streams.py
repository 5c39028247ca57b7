"""Streams of a constant state may be long: after 10^5 tokens every output and every number of the state is finite."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from cases import small_config

from subquad.build import build_from_config, list_mixers, make_dims
from subquad.interface import MixerConfig

LENGTH, CALL = 100_000, 1_000
DIMS = make_dims(embed_dim=4, num_heads=2, causal=True, max_length=LENGTH)
CONSTANT = [
    config for config in map(small_config, list_mixers(causal=True, state=True)) if config.traits.constant_state
]


@pytest.mark.slow
@pytest.mark.parametrize("config", CONSTANT, ids=lambda config: config.name)
def test_a_hundred_thousand_tokens_leave_every_number_finite(config: MixerConfig) -> None:
    torch.manual_seed(0)
    mixer = build_from_config(config, DIMS).eval()
    state = mixer.init_state(1)
    size = state.nbytes
    with torch.no_grad():
        for _ in range(LENGTH // CALL):
            y, state, _ = mixer(torch.randn(1, CALL, 4), state=state)
            assert bool(y.isfinite().all())
    assert state is not None
    assert state.length.tolist() == [LENGTH]
    assert state.nbytes == size
    assert all(bool(getattr(state, field.name).isfinite().all()) for field in fields(state))
