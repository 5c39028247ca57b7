"""Linformer: keys and values compressed along the length by learned matrices."""

from __future__ import annotations

import pytest
import torch
from comparison import (
    assert_cross_equals_definition,
    assert_same_values_and_gradients,
    disturbed,
    finish,
    is_valid,
    masks,
    qkv,
    softmax_over,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad import Mask
from subquad.build import build_mixer
from subquad.mechanisms.linformer import Linformer

SHARINGS = ("none", "headwise", "key_value", "layerwise")


def linformer(sharing: str = "none", *, rank: int = 3, max_length: int = 12, cross: bool = False) -> Linformer:
    mixer = build_mixer(
        "linformer", embed_dim=4, num_heads=2, cross=cross, max_length=max_length, rank=rank, sharing=sharing
    )
    assert isinstance(mixer, Linformer)
    disturbed(mixer)
    return mixer


def definition(mixer: Linformer, x: Tensor, source: Tensor, mask: Mask | None, source_mask: Mask | None) -> Tensor:
    """The n-th valid token of the source meets the n-th column of P."""
    q, k, v = qkv(mixer, x, source)
    heads = mixer.dims.num_heads
    of_keys = mixer.compress_key.expand(heads, -1, -1)
    of_values = of_keys if mixer.compress_value is None else mixer.compress_value.expand(heads, -1, -1)
    out = []
    for b in range(x.shape[0]):
        tokens = [j for j in range(source.shape[1]) if is_valid(source_mask, b, j)]
        keys = torch.einsum("hrn,nhe->rhe", of_keys[..., : len(tokens)], k[b, tokens])
        values = torch.einsum("hrn,nhe->rhe", of_values[..., : len(tokens)], v[b, tokens])
        out.append(torch.stack([softmax_over(q[b, i], keys, values) for i in range(x.shape[1])]))
    return finish(mixer, torch.stack(out), mask)


@pytest.mark.parametrize("sharing", SHARINGS)
@given(length=st.sampled_from([1, 2, 3, 4, 12]), data=st.data())
def test_it_equals_the_definition(sharing: str, length: int, data: st.DataObject) -> None:
    mixer, mask = linformer(sharing), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(
        mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, x, mask, mask), [x]
    )


@given(length=st.sampled_from([1, 5, 12]), source_length=st.sampled_from([1, 5, 12]), data=st.data())
def test_cross_attention_equals_the_definition(length: int, source_length: int, data: st.DataObject) -> None:
    mixer = linformer(cross=True)
    assert_cross_equals_definition(mixer, definition, length, source_length, data)


@pytest.mark.parametrize("permuted", [False, True])
def test_with_full_rank_and_the_identity_it_is_softmax_attention(permuted: bool) -> None:
    mixer, x = linformer("headwise", rank=9, max_length=9), torch.randn(2, 9, 4, dtype=torch.float64)
    matrix = torch.eye(9, dtype=torch.float64)[torch.randperm(9) if permuted else torch.arange(9)]
    assert mixer.compress_value is not None
    with torch.no_grad():
        mixer.compress_key.copy_(matrix[None])
        mixer.compress_value.copy_(matrix[None])
    dense = build_mixer("full", embed_dim=4, num_heads=2).double()
    dense.load_state_dict({name: value for name, value in mixer.state_dict().items() if "compress" not in name})
    torch.testing.assert_close(mixer(x).y, dense(x).y, rtol=1e-10, atol=1e-10)


def test_with_averages_over_blocks_it_is_attention_to_mean_keys_and_values() -> None:
    mixer, x = linformer("key_value", rank=4, max_length=12), torch.randn(2, 12, 4, dtype=torch.float64)
    with torch.no_grad():
        mixer.compress_key.copy_((torch.eye(4, dtype=torch.float64) / 3).repeat_interleave(3, dim=1)[None])
    q, k, v = qkv(mixer, x)
    k, v = (tensor.unflatten(1, (4, 3)).mean(dim=2) for tensor in (k, v))
    out = torch.stack([torch.stack([softmax_over(q[b, i], k[b], v[b]) for i in range(12)]) for b in range(2)])
    torch.testing.assert_close(mixer(x).y, finish(mixer, out, None), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("sharing", "matrices", "heads"), [("none", 2, 2), ("headwise", 2, 1), ("key_value", 1, 1), ("layerwise", 1, 1)]
)
def test_sharing_sets_the_number_of_compressions(sharing: str, matrices: int, heads: int) -> None:
    mixer = linformer(sharing)
    found = [parameter for name, parameter in mixer.named_parameters() if "compress" in name]
    assert [tuple(parameter.shape) for parameter in found] == [(heads, 3, 12)] * matrices
    assert mixer.shared_parameters() == (("compress_key",) if sharing == "layerwise" else ())


def test_a_shared_compression_gathers_the_gradients_of_keys_and_values() -> None:
    shared, apart = linformer("key_value"), linformer("headwise")
    apart.load_state_dict(shared.state_dict() | {"compress_value": shared.compress_key})
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    for mixer in (shared, apart):
        mixer(x).y.square().sum().backward()
    assert apart.compress_value is not None
    assert apart.compress_value.grad is not None
    assert apart.compress_key.grad is not None
    total = apart.compress_key.grad + apart.compress_value.grad
    torch.testing.assert_close(shared.compress_key.grad, total, rtol=1e-10, atol=1e-10)


def test_padding_leaves_the_result_wherever_it_stands() -> None:
    mixer, x = linformer(), torch.randn(1, 6, 4, dtype=torch.float64)
    valid = torch.tensor([[False, True, True, False, True, True, True, False, False, True]])
    spread = torch.randn(1, 10, 4, dtype=torch.float64)
    spread[valid] = x[0]
    torch.testing.assert_close(mixer(spread, mask=Mask(valid)).y[valid], mixer(x).y[0], rtol=1e-10, atol=1e-10)


def test_compressed_rows_keep_the_scale_of_a_key() -> None:
    mixer = build_mixer("linformer", embed_dim=4, num_heads=2, max_length=4096, rank=64)
    assert isinstance(mixer, Linformer)
    compressed = mixer.compress_key.detach() @ torch.randn(4096, 8)
    assert 0.9 < float(compressed.std()) < 1.1


def test_longer_input_and_context_are_refused() -> None:
    with pytest.raises(ValueError, match="x has length 13 but was built for max_length=12"):
        linformer()(torch.zeros(1, 13, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="context has length 13 but was built for max_length=12"):
        linformer(cross=True)(torch.zeros(1, 3, 4), torch.zeros(1, 13, 4))


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="linformer: rank must be at least 1, got 0"):
        linformer(rank=0)
    with pytest.raises(
        ValueError, match="option 'sharing' must be one of 'none', 'headwise', 'key_value', 'layerwise'"
    ):
        linformer("head")
