"""gMLP and aMLP: half of the hidden channels gated by a matrix over positions and a narrow head of attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_same_values_and_gradients, is_valid, masks
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from subquad import Mask
from subquad.build import build_mixer, cost, make_dims
from subquad.mechanisms.gmlp import Gmlp, GmlpConfig

LONGEST = 12
CONFIGS = st.builds(
    GmlpConfig,
    hidden_dim=st.sampled_from([None, 6]),
    weights=st.sampled_from(["full", "toeplitz"]),
    attention_dim=st.sampled_from([0, 3]),
)


def gmlp(config: GmlpConfig, *, causal: bool) -> Gmlp:
    """In float64, with no parameter at 0 or 1."""
    mixer = Gmlp(config, make_dims(embed_dim=4, num_heads=2, max_length=LONGEST, causal=causal)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return mixer


def weight(mixer: Gmlp, i: int, j: int) -> Tensor:
    """W_ij."""
    if mixer.config.weights == "full":
        return mixer.token_weights[i, j]
    return mixer.token_weights[i - j + (0 if mixer.dims.causal else LONGEST - 1)]


def attended(mixer: Gmlp, u: Tensor, i: int, seen: list[int]) -> Tensor | float:
    """What aMLP adds to the gate of token i of u (L, D)."""
    if mixer.attention is None:
        return 0.0
    q, k, v = mixer.attention.project_in(u).chunk(3, dim=-1)
    shares = torch.softmax(k[seen] @ q[i] / q.shape[-1] ** 0.5, dim=0)
    return mixer.attention.project_out(shares @ v[seen])


def gated(mixer: Gmlp, x: Tensor) -> Tensor:
    """The definition for one sequence (L, D) without padding, token by token."""
    u, rows = mixer.norm(x), []
    passed, gating = F.gelu(mixer.project_in(u)).chunk(2, dim=-1)
    gating = mixer.gate_norm(gating)
    for i in range(len(x)):
        seen = list(range(i + 1 if mixer.dims.causal else len(x)))
        gate = torch.stack([weight(mixer, i, j) * gating[j] for j in seen]).sum(dim=0) + mixer.token_biases[i]
        rows.append(x[i] + mixer.project_out(passed[i] * (gate + attended(mixer, u, i, seen))))
    return torch.stack(rows)


def definition(mixer: Gmlp, x: Tensor, mask: Mask | None) -> Tensor:
    y = []
    for b in range(len(x)):
        places = [i for i in range(x.shape[1]) if is_valid(mask, b, i)]
        results = dict(zip(places, gated(mixer, x[b, places]) if places else [], strict=True))
        y.append(torch.stack([results.get(i, 0 * x[b, i]) for i in range(x.shape[1])]))
    return torch.stack(y)


@given(config=CONFIGS, causal=st.booleans(), length=st.sampled_from([1, 2, 5, LONGEST]), data=st.data())
@example(config=GmlpConfig(), causal=False, length=7, data=None)
@example(config=GmlpConfig(attention_dim=3, weights="toeplitz"), causal=True, length=7, data=None)
def test_it_equals_the_definition(config: GmlpConfig, causal: bool, length: int, data: st.DataObject | None) -> None:
    mixer = gmlp(config, causal=causal)
    mask = None if data is None else data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@pytest.mark.parametrize("config", [GmlpConfig(weights="toeplitz"), GmlpConfig(attention_dim=3)], ids=repr)
def test_every_causal_form_is_a_stream(config: GmlpConfig) -> None:
    """Prefixes, and calls of any size whose rows hold different numbers of tokens."""
    mixer, x = gmlp(config, causal=True), torch.randn(3, 11, 4, dtype=torch.float64)
    for mask in (None, Mask(torch.rand(3, 11) < 0.6), Mask(torch.zeros(3, 11, dtype=torch.bool))):
        y, state, start = mixer(x, mask=mask).y, mixer.init_state(3), 0
        for size in (4, 1, 6):
            stop = start + size
            facts = [None if mask is None or mask.valid is None else Mask(mask.valid[:, s:stop]) for s in (0, start)]
            torch.testing.assert_close(mixer(x[:, :stop], mask=facts[0]).y, y[:, :stop], rtol=1e-10, atol=1e-10)
            part, state, _ = mixer(x[:, start:stop], mask=facts[1], state=state)
            torch.testing.assert_close(part, y[:, start:stop], rtol=1e-10, atol=1e-10)
            start = stop


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("weights", ["full", "toeplitz"])
def test_a_new_block_is_a_feed_forward(weights: str, causal: bool) -> None:
    mixer = build_mixer("gmlp", embed_dim=8, num_heads=2, max_length=50, weights=weights, causal=causal)
    assert isinstance(mixer, Gmlp)
    x = torch.randn(2, 50, 8)
    passed = F.gelu(mixer.project_in(mixer.norm(x))).chunk(2, dim=-1)[0]
    torch.testing.assert_close(mixer(x).y, x + mixer.project_out(passed), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        mixer.token_weights.zero_()
    torch.testing.assert_close(mixer(x).y, x + mixer.project_out(passed))


@pytest.mark.parametrize("causal", [False, True])
def test_toeplitz_weights_are_full_ones_that_are_equal_on_diagonals(causal: bool) -> None:
    bound = gmlp(GmlpConfig(weights="toeplitz"), causal=causal)
    free = gmlp(GmlpConfig(), causal=causal)
    matrix = [
        [weight(bound, i, j) if j <= i or not causal else torch.randn(()) for j in range(LONGEST)]
        for i in range(LONGEST)
    ]
    written = torch.stack([torch.stack([entry.double() for entry in row]) for row in matrix])
    free.load_state_dict(bound.state_dict() | {"token_weights": written})
    x = torch.randn(2, LONGEST, 4, dtype=torch.float64)
    torch.testing.assert_close(free(x).y, bound(x).y, rtol=1e-10, atol=1e-10)


@given(config=CONFIGS, causal=st.booleans(), bias=st.booleans())
def test_the_price_knows_the_parameters_of_every_form(config: GmlpConfig, causal: bool, bias: bool) -> None:
    dims = make_dims(embed_dim=6, num_heads=2, max_length=9, bias=bias, causal=causal)
    assert config.cost(dims, 9, 4).parameters == sum(parameter.numel() for parameter in Gmlp(config, dims).parameters())


@pytest.mark.parametrize("causal", [False, True])
def test_transforms_cost_less_than_the_matrix(causal: bool) -> None:
    full, toeplitz = (
        cost("gmlp", length=4096, embed_dim=512, num_heads=8, max_length=4096, weights=weights, causal=causal)
        for weights in ("full", "toeplitz")
    )
    projections = 2 * 4096 * 3 * 512 * 1536
    assert full.flops - projections == 2 * 1536 * (4096 * 4097 // 2 if causal else 4096**2)
    mixing = toeplitz.flops - projections
    assert mixing < (full.flops - projections) / 4
    if not causal:
        assert mixing == (2 * 1536 + 1) * 5 * 8192 * 13 // 2
    assert full.parameters - toeplitz.parameters == 4096**2 - (4096 if causal else 8191)


def test_a_stream_longer_than_the_weights_is_refused() -> None:
    mixer = gmlp(GmlpConfig(), causal=True)
    state = mixer(torch.randn(1, LONGEST, 4).double(), state=mixer.init_state(1)).state
    with pytest.raises(ValueError, match="gmlp: the stream has come to 13 tokens but was built for max_length=12"):
        mixer(torch.randn(1, 1, 4).double(), state=state)


@pytest.mark.parametrize("hidden_dim", [0, 7])
def test_a_hidden_layer_without_two_halves_is_refused(hidden_dim: int) -> None:
    with pytest.raises(ValueError, match=f"gmlp: hidden_dim .* even and at least 2, got {hidden_dim}"):
        GmlpConfig(hidden_dim=hidden_dim)


def test_attention_of_negative_width_is_refused() -> None:
    with pytest.raises(ValueError, match="gmlp: attention_dim must be at least 0, got -1"):
        GmlpConfig(attention_dim=-1)
