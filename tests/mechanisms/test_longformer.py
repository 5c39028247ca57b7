"""Longformer: window and global columns in one softmax, rows of global tokens by projections of their own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import (
    assert_same_values_and_gradients,
    disturbed,
    finish,
    is_valid,
    masks,
    qkv,
    same_document,
    softmax_over,
    split_heads,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LongformerConfig as PeerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from subquad import Mask
from subquad.build import build_mixer
from subquad.interface import Dims
from subquad.layers.heads import projection_cost
from subquad.mechanisms import longformer as module
from subquad.mechanisms.longformer import Longformer, LongformerConfig


def longformer(window: int, **form: Any) -> Longformer:
    mixer = build_mixer("longformer", embed_dim=form.pop("embed_dim", 4), num_heads=2, window=window, **form)
    assert isinstance(mixer, Longformer)
    disturbed(mixer)
    return mixer


def near(mixer: Longformer, head: int, i: int, j: int) -> bool:
    """Whether j lies in the window of i: a number of steps of the head's length away."""
    window, dilation = mixer.config.window, mixer.config.dilation
    step = dilation if isinstance(dilation, int) else dilation[head % len(dilation)]
    steps, remainder = divmod(i - j, step)
    inside = 0 <= steps < window if mixer.dims.causal else abs(steps) <= (window - 1) // 2
    return inside and remainder == 0


def definition(mixer: Longformer, x: Tensor, mask: Mask | None) -> Tensor:
    causal, num_heads = mixer.dims.causal, mixer.dims.num_heads
    q, k, v = qkv(mixer, x)
    global_layers = (mixer.project_global_query, mixer.project_global_key, mixer.project_global_value)
    global_q, global_k, global_v = (split_heads(mixer, layer, x) for layer in global_layers)
    marked = None if mask is None else mask.global_tokens

    def is_global(b: int, j: int) -> bool:
        return marked is not None and bool(marked[b, j]) and is_valid(mask, b, j)

    def allowed(b: int, i: int, j: int) -> bool:
        return is_valid(mask, b, j) and same_document(mask, b, i, j) and (j <= i or not causal)

    out = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            if is_global(b, i):
                keys = [j for j in range(x.shape[1]) if allowed(b, i, j)]
                row = softmax_over(global_q[b, i], global_k[b, keys], global_v[b, keys])
            else:
                rows = []
                for h in range(num_heads):
                    keys = [
                        j for j in range(x.shape[1]) if allowed(b, i, j) and (near(mixer, h, i, j) or is_global(b, j))
                    ]
                    rows.append(softmax_over(q[b, i, h, None], k[b, keys, h, None], v[b, keys, h, None]))
                row = torch.cat(rows)
            place = torch.zeros_like(out)
            place[b, i] = 1.0
            out = out + place * row
    return finish(mixer, out, mask)


@pytest.mark.parametrize("causal", [False, True])
@given(
    length=st.sampled_from([1, 2, 6, 13, 22]),
    window=st.sampled_from([1, 3, 5, 71]),
    dilation=st.sampled_from([1, 2, (1, 2), (3, 1), (5, 5)]),
    share=st.sampled_from([None, 0.0, 0.2, 1.0]),
    largest_mask=st.sampled_from([1, 60, 2**21]),
    data=st.data(),
)
def test_it_equals_the_definition(
    causal: bool,
    length: int,
    window: int,
    dilation: int | tuple[int, ...],
    share: float | None,
    largest_mask: int,
    data: st.DataObject,
) -> None:
    mixer, mask = longformer(window, dilation=dilation, causal=causal), data.draw(masks(2, length))
    if share is not None:
        facts = mask or Mask()
        mask = Mask(facts.valid, facts.segments, torch.rand(2, length) < share)
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:  # held until the backward pass, in which slices are made again
        patch.setattr(module, "LARGEST_MASK", largest_mask)
        assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@given(
    length=st.integers(0, 30),
    window=st.sampled_from([1, 3, 9]),
    dilation=st.sampled_from([1, 2, (1, 3), (4, 7)]),
    count=st.integers(0, 12),
    causal=st.booleans(),
)
def test_the_price_counts_each_visible_pair_once(
    length: int, window: int, dilation: int | tuple[int, ...], count: int, causal: bool
) -> None:
    mixer = longformer(window, dilation=dilation, causal=causal)
    dims = replace(mixer.dims, num_global=count)
    seen = [
        (h, i, j)
        for h in range(2)
        for i in range(length)
        for j in range(length)
        if near(mixer, h, i, j) or (j < count and (j <= i or not causal))
    ]
    used = min(count, length)
    rows = sum(i + 1 if causal else length for i in range(used))
    flops = 2 * 2 * dims.head_dim * (len(seen) + 2 * rows)
    if used:
        flops += 2 * (2 * length + used) * dims.embed_dim * dims.inner_dim
    assert mixer.config.cost(dims, length, 4).flops == projection_cost(dims, length, 4).flops + flops


def test_the_price_is_arithmetic_at_any_length() -> None:
    config, dims = LongformerConfig(dilation=(1, 2)), Dims(embed_dim=8, num_heads=2, head_dim=4, num_global=5)
    once, twice = (config.cost(dims, length, 4).flops for length in (2**20, 2**21))
    assert 2 * once < twice < 2 * once * 1.001


def test_a_step_reaches_further_with_as_many_keys() -> None:
    mixer = longformer(5, dilation=(1, 3))
    with torch.no_grad():
        mixer.project_out.weight.copy_(torch.eye(4))  # a head's output in two channels of its own
    x = torch.randn(1, 20, 4, dtype=torch.float64, requires_grad=True)
    y = mixer(x).y[0, 10]
    for head, places in enumerate(([8, 9, 10, 11, 12], [4, 7, 10, 13, 16])):
        (gradient,) = torch.autograd.grad(y[2 * head : 2 * head + 2].sum(), x, retain_graph=True)
        assert gradient[0].abs().amax(dim=1).nonzero()[:, 0].tolist() == places


def test_rows_of_global_tokens_keep_no_mask_for_the_backward_pass() -> None:
    mixer, kept = longformer(3), []
    marked = (torch.arange(20) % 4 == 0)[None]

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        mixer(torch.randn(1, 20, 4, dtype=torch.float64), mask=Mask(global_tokens=marked))
    assert kept
    assert not [shape for shape in kept if shape[-2:] == (5, 20)]


@pytest.mark.parametrize("causal", [False, True])
def test_examples_with_different_numbers_of_global_tokens_keep_to_themselves(causal: bool) -> None:
    mixer = longformer(3, causal=causal)
    x = torch.randn(3, 9, 4, dtype=torch.float64)
    marked = torch.zeros(3, 9, dtype=torch.bool)
    marked[0, [0, 4, 8]] = True
    marked[1, 5] = True
    together = mixer(x, mask=Mask(global_tokens=marked)).y
    for b in range(3):
        alone = mixer(x[b : b + 1], mask=Mask(global_tokens=marked[b : b + 1])).y
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-10, atol=1e-10)


def test_without_global_tokens_it_is_windowed_attention() -> None:
    mixer, x = longformer(5), torch.randn(2, 40, 4, dtype=torch.float64)
    local = build_mixer("local", embed_dim=4, num_heads=2, window=5).double()
    local.load_state_dict({name: value for name, value in mixer.state_dict().items() if "global" not in name})
    torch.testing.assert_close(mixer(x).y, local(x).y, rtol=1e-10, atol=1e-10)
    nobody = Mask(global_tokens=torch.zeros(2, 40, dtype=torch.bool))
    assert torch.equal(mixer(x, mask=nobody).y, mixer(x).y)


@pytest.mark.parametrize("dilation", [1, (1, 2)])
def test_a_window_of_the_token_alone_sees_global_tokens_on_both_sides(dilation: int | tuple[int, ...]) -> None:
    mixer, x = longformer(1, dilation=dilation), torch.randn(1, 9, 4, dtype=torch.float64, requires_grad=True)
    marked = torch.zeros(1, 9, dtype=torch.bool)
    marked[0, [1, 7]] = True
    (gradient,) = torch.autograd.grad(mixer(x, mask=Mask(global_tokens=marked)).y[0, 4].sum(), x)
    assert gradient[0].abs().amax(dim=1).nonzero()[:, 0].tolist() == [1, 4, 7]


def test_without_global_tokens_the_second_projections_get_no_gradient() -> None:
    mixer = longformer(5)
    mixer(torch.randn(1, 9, 4, dtype=torch.float64)).y.sum().backward()
    assert all(p.grad is None for name, p in mixer.named_parameters() if "global" in name)


def test_global_columns_use_the_first_projections_and_global_rows_the_second() -> None:
    mixer, x = longformer(3), torch.randn(1, 12, 4, dtype=torch.float64)
    marked = torch.zeros(1, 12, dtype=torch.bool)
    marked[0, 2] = True
    before = mixer(x, mask=Mask(global_tokens=marked)).y
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if "global" in name:
                parameter.mul_(2.0)
    after = mixer(x, mask=Mask(global_tokens=marked)).y
    assert torch.equal(before[~marked], after[~marked])
    assert not torch.allclose(before[marked], after[marked])


def test_a_global_token_in_the_padding_counts_as_padding() -> None:
    mixer, x = longformer(3), torch.randn(1, 8, 4, dtype=torch.float64)
    mask = Mask.from_lengths([6], 8)
    marked = torch.zeros(1, 8, dtype=torch.bool)
    marked[0, 7] = True
    assert torch.equal(mixer(x, mask=Mask(mask.valid, None, marked)).y, mixer(x, mask=mask).y)


def test_rotary_positions_reach_the_second_projections_too() -> None:
    mixer, x = longformer(3, positions="rotary"), torch.randn(1, 9, 4, dtype=torch.float64)
    marked = torch.zeros(1, 9, dtype=torch.bool)
    marked[0, 0] = marked[0, 4] = True
    shifted = torch.cat((torch.randn(1, 5, 4, dtype=torch.float64), x), dim=1)
    documents = torch.tensor([[0] * 5 + [1] * 9])
    packed = mixer(shifted, mask=Mask(None, documents, torch.cat((marked[:, :5] & False, marked), dim=1))).y
    alone = mixer(x, mask=Mask(global_tokens=marked)).y
    torch.testing.assert_close(packed[:, 5:], alone, rtol=1e-10, atol=1e-10)
    plain = longformer(3)
    plain.load_state_dict(mixer.state_dict())
    assert not torch.allclose(plain(x, mask=Mask(global_tokens=marked)).y[marked], alone[marked])


def test_a_window_as_long_as_the_sequence_is_dense_attention() -> None:
    mixer, x = longformer(99), torch.randn(2, 20, 4, dtype=torch.float64)
    dense = build_mixer("full", embed_dim=4, num_heads=2).double()
    dense.load_state_dict({name: value for name, value in mixer.state_dict().items() if "global" not in name})
    torch.testing.assert_close(mixer(x).y, dense(x).y, rtol=1e-10, atol=1e-10)


def test_steps_by_head_need_as_many_heads() -> None:
    with pytest.raises(ValueError, match="longformer: dilation has 3 values for 2 heads; give one for all heads, or"):
        longformer(5, dilation=(1, 1, 2))


@pytest.mark.parametrize("dilation", [0, (1, -1), ()])
def test_a_step_is_at_least_one_key(dilation: int | tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=rf"longformer: dilation is the step .* 1 for a plain window.*got {re.escape(str(dilation))}"
    ):
        longformer(5, dilation=dilation)


def test_steps_by_head_survive_json() -> None:
    config = LongformerConfig(dilation=(1, 2))
    assert LongformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_even_two_sided_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"longformer: .* must be odd; got 128, use 127 or 129"):
        build_mixer("longformer", embed_dim=4, num_heads=2, window=128)


class TestAgainstTheReleasedImplementation:
    """Hugging Face's port of the official code, with our weights; it computes its softmax in float32."""

    RADIUS = 4

    @pytest.fixture
    def mixer(self) -> Longformer:
        return longformer(2 * self.RADIUS + 1, embed_dim=16)

    @pytest.fixture
    def peer(self, mixer: Longformer) -> nn.Module:
        config = PeerConfig(
            hidden_size=16, num_attention_heads=2, attention_window=[2 * self.RADIUS], attention_probs_dropout_prob=0.0
        )
        peer = LongformerSelfAttention(config, layer_id=0).double().eval()
        pairs = (
            (peer.query, mixer.project_query),
            (peer.key, mixer.project_key),
            (peer.value, mixer.project_value),
            (peer.query_global, mixer.project_global_query),
            (peer.key_global, mixer.project_global_key),
            (peer.value_global, mixer.project_global_value),
        )
        for theirs, ours in pairs:
            theirs.load_state_dict(ours.state_dict())
        return peer

    @pytest.mark.parametrize("places", [[], [0], [0, 7, 21], [23]])
    @pytest.mark.parametrize("lengths", [[24, 24], [24, 18], [17, 24]])
    def test_the_results_are_the_same(
        self, mixer: Longformer, peer: nn.Module, places: list[int], lengths: list[int]
    ) -> None:
        x = torch.randn(2, 24, 16, dtype=torch.float64)
        valid = Mask.from_lengths(lengths, 24).valid
        assert valid is not None
        marked = torch.zeros(2, 24, dtype=torch.bool)
        marked[0, places] = True
        marked[1, places[:1]] = True
        codes = torch.where(valid, torch.where(marked, 10_000.0, 0.0), -10_000.0).double()
        theirs = peer(
            x,
            attention_mask=codes,
            is_index_masked=codes < 0,
            is_index_global_attn=codes > 0,
            is_global_attn=bool((codes > 0).any()),
        )[0]
        ours = mixer(x, mask=Mask(valid, None, marked)).y
        torch.testing.assert_close(ours[valid], mixer.project_out(theirs)[valid], rtol=1e-6, atol=1e-6)
