"""AFT equals its definition, token by token and channel by channel, in every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import assert_same_values_and_gradients, disturbed, masks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad import Mask
from subquad.build import build_mixer, make_dims, mixer_config
from subquad.interface import TokenMixer
from subquad.layers.key_memory import KeyMemory
from subquad.layers.key_positions import FactorisedPositions, KernelPositions
from subquad.mechanisms.aft import Aft
from subquad.state import State

LENGTHS = st.sampled_from([1, 2, 3, 5, 9, 14])
KINDS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full", "rank": 3},
    "local": {"kind": "local", "window": 5, "rank": 3},
    "simple": {"kind": "simple"},
    "conv": {"kind": "conv", "kernel": 3},
}


def aft(*, causal: bool = False, **options: Any) -> Aft:
    mixer = build_mixer("aft", embed_dim=4, num_heads=2, causal=causal, max_length=20, **options)
    assert isinstance(mixer, Aft)
    return disturbed(mixer)  # pyright: ignore[reportArgumentType, reportReturnType] - it only adds to the parameters


def bias_of(mixer: Aft, i: int, j: int) -> Tensor | float:
    """w of a pair of positions, for each head or for all."""
    config, positions = mixer.config, mixer.positions
    if isinstance(positions, FactorisedPositions):
        reach = config.window - 1 if mixer.dims.causal else (config.window - 1) // 2
        near = config.kind == "full" or abs(i - j) <= reach
        return positions.rows[i] @ positions.columns[j] if near else 0.0
    if isinstance(positions, KernelPositions):
        raw, size = positions.kernels, config.kernel
        kernels = positions.gain * (raw - raw.mean(1, keepdim=True)) / (raw.var(1, correction=0)[:, None] + 1e-5).sqrt()
        kernels = kernels + positions.shift
        half = size - 1 if mixer.dims.causal else size // 2
        if config.columns is None:
            return kernels[:, j - i + half] if 0 <= j - i + half < size else 0.0
        down, across = (j // config.columns - i // config.columns), (j % config.columns - i % config.columns)
        near = abs(down) <= half and abs(across) <= half
        return kernels.unflatten(1, (size, size))[:, down + half, across + half] if near else 0.0
    return 0.0


def definition(mixer: Aft, x: Tensor, mask: Mask | None = None) -> Tensor:
    """One token after the other."""
    q, v = mixer.project_query(x), mixer.project_value(x)
    k = mixer.project_key(x).unflatten(2, (mixer.groups, -1)).expand(-1, -1, -1, 4 // mixer.groups).flatten(2)
    rows = []
    for b in range(x.shape[0]):
        tokens = [i for i in range(x.shape[1]) if mask is None or mask.valid is None or bool(mask.valid[b, i])]
        on_grid = mixer.config.columns is not None
        places = {token: token if on_grid else place for place, token in enumerate(tokens)}
        for i in range(x.shape[1]):
            seen = [j for j in tokens if j <= i or not mixer.dims.causal]
            if i not in tokens:
                rows.append(0 * mixer.project_out(v[b, i]))
                continue
            logits = []
            for j in seen:
                bias = bias_of(mixer, places[i], places[j])
                wide = bias.repeat_interleave(2) if isinstance(bias, Tensor) and bias.ndim else bias
                logits.append(k[b, j] + wide)
            weights = torch.stack(logits).softmax(dim=0)
            rows.append(mixer.project_out(q[b, i].sigmoid() * (weights * v[b, seen]).sum(dim=0)))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@given(length=LENGTHS, data=st.data())
def test_it_equals_the_definition(kind: str, causal: bool, length: int, data: st.DataObject) -> None:
    mixer, mask = aft(causal=causal, **KINDS[kind]), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@given(length=LENGTHS, columns=st.integers(1, 6), data=st.data())
def test_kernels_on_a_grid_equal_the_definition(length: int, columns: int, data: st.DataObject) -> None:
    mixer, mask = aft(kind="conv", kernel=3, columns=columns), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@pytest.mark.parametrize("kind", KINDS)
@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=3), data=st.data())
def test_a_stream_in_pieces_equals_one_call(kind: str, cuts: list[int], data: st.DataObject) -> None:
    mixer, length = aft(causal=True, **KINDS[kind]), sum(cuts)
    mask = data.draw(masks(2, length, segments=False)) or Mask(torch.ones(2, length, dtype=torch.bool))
    assert mask.valid is not None
    x, state, outputs = torch.randn(2, length, 4, dtype=torch.float64), mixer.init_state(2), []
    for part, valid in zip(x.split(cuts, dim=1), mask.valid.split(cuts, dim=1), strict=True):
        y, state, _ = mixer(part, mask=Mask(valid), state=state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), definition(mixer, x, mask), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_over_everything_is_the_full_kind(causal: bool) -> None:
    full, local = aft(causal=causal, kind="full"), aft(causal=causal, kind="local", window=41)
    local.load_state_dict(full.state_dict())
    x = torch.randn(2, 20, 4, dtype=torch.float64)
    torch.testing.assert_close(local(x).y, full(x).y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["full", "local"])
def test_without_a_bias_it_is_the_simple_kind(kind: str, causal: bool) -> None:
    mixer, simple = aft(causal=causal, **KINDS[kind]), aft(causal=causal, kind="simple")
    simple.load_state_dict(mixer.state_dict(), strict=False)
    assert isinstance(mixer.positions, FactorisedPositions)
    mixer.positions.rows.data.zero_()
    x = torch.randn(2, 20, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x).y, simple(x).y, rtol=1e-10, atol=1e-10)


def test_a_new_conv_begins_as_means_without_positions_and_its_kernel_wakes_up_after_gain_and_shift() -> None:
    mixer, x = build_mixer("aft", embed_dim=4, num_heads=2, kind="conv").double(), torch.randn(1, 9, 4).double()
    assert isinstance(mixer, Aft)
    assert isinstance(mixer.positions, KernelPositions)
    y = mixer(x).y
    torch.testing.assert_close(y, definition(mixer, x))
    y.square().sum().backward()
    gradients = [mixer.positions.kernels.grad, mixer.positions.gain.grad, mixer.positions.shift.grad]
    assert [gradient is not None and bool(gradient.any()) for gradient in gradients] == [False, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_huge_key_does_not_erase_earlier_tokens(kind: str) -> None:
    """Relative to the largest key of the sequence, the weights of all tokens before it would be 0 in float32."""
    mixer = build_mixer("aft", embed_dim=4, num_heads=2, causal=True, max_length=20, **KINDS[kind])
    x = torch.randn(1, 20, 4)
    for sign in (1, -1):
        changed = x.clone()
        changed[:, 12] *= sign * 1e4
        changed[:, 15] *= -sign * 1e4
        torch.testing.assert_close(mixer(changed).y[:, :12], mixer(x).y[:, :12])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_ten_thousand_choose_the_largest(kind: str, causal: bool) -> None:
    mixer = build_mixer("aft", embed_dim=4, num_heads=2, causal=causal, max_length=20, **KINDS[kind])
    assert isinstance(mixer, Aft)
    mixer.project_key.weight.data.mul_(1e4)
    x = torch.randn(2, 20, 4, requires_grad=True)
    torch.testing.assert_close(mixer(x).y, definition(mixer, x), rtol=1e-3, atol=1e-4)
    mixer(x).y.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in mixer.parameters())


def test_the_simple_state_is_one_mean_and_the_local_one_a_window_more() -> None:
    sizes = {}
    for kind, options in KINDS.items():
        mixer, state = aft(causal=True, **options), aft(causal=True, **options).init_state(1)
        for _ in range(9):
            state = advanced(mixer, state)
        assert isinstance(state, KeyMemory)
        sizes[kind] = state.keys.shape[2]
    assert sizes == {"full": 9, "local": 4, "simple": 0, "conv": 2}


def advanced(mixer: TokenMixer, state: State) -> State:
    after = mixer(torch.randn(1, 1, 4, dtype=torch.float64), state=state).state
    assert after is not None
    return after


def test_traits_follow_the_options() -> None:
    traits = {kind: mixer_config("aft", **options).traits for kind, options in KINDS.items()}
    assert {kind for kind, found in traits.items() if found.fixed_length} == {"full", "local"}
    assert {kind for kind, found in traits.items() if found.constant_state} == {"local", "simple", "conv"}
    grid = mixer_config("aft", kind="conv", columns=4).traits
    assert (grid.bidirectional, grid.causal, grid.state) == (True, False, False)


@pytest.mark.parametrize("kind", ["full", "local"])
def test_a_stream_beyond_the_longest_is_refused(kind: str) -> None:
    mixer = aft(causal=True, **KINDS[kind])
    state = mixer(torch.randn(1, 18, 4, dtype=torch.float64), state=mixer.init_state(1)).state
    with pytest.raises(ValueError, match="aft: the stream has come to 21 tokens but was built for max_length=20"):
        mixer(torch.randn(1, 3, 4, dtype=torch.float64), state=state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "aft: window must be at least 1, got 0"),
        ({"kind": "conv", "kernel": 4}, "aft: a two-sided window .* must be odd; got 4, use 3 or 5"),
        ({"kind": "simple", "columns": 3}, "aft: columns .* for kind='conv' alone; got 3 with kind='simple'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer("aft", embed_dim=4, num_heads=2, max_length=20, **options)


def test_the_price_of_the_full_kind_is_quadratic_and_that_of_the_others_linear() -> None:
    dims = make_dims(embed_dim=8, num_heads=2, max_length=2**14)
    growth = {}
    for kind, options in KINDS.items():
        once, twice = (mixer_config("aft", **options).cost(dims, length, 4).flops for length in (2**13, 2**14))
        growth[kind] = round(twice / once)
    assert growth == {"full": 4, "local": 2, "simple": 2, "conv": 2}
