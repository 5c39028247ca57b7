"""The price that a mechanism names is what the counters count: exactly, for every mechanism in every form.

Lengths are multiples of the block of windowed attention: queries that fill up a last block are not priced.
"""

from __future__ import annotations

import importlib
import math
import re
from dataclasses import fields, replace

import pytest
import torch
from cases import WIDE_HEADS, form_of, forms, small_config
from meter import counted_flops, differentiated, saved_bytes
from torch import Tensor

from subquad import Mask
from subquad.build import build_from_config, list_mixers, make_dims, mixer_config
from subquad.costs import Cost, overtaking_length
from subquad.interface import Dims, TokenMixer
from subquad.layers.heads import projection_cost
from subquad.registry import MIXERS

CASES = [
    pytest.param(name, replace(dims, num_global=count), id=f"{name}-{form_of(dims)}-{count} global")
    for name in list_mixers()
    for dims in forms(name)
    for count in ((0, 3) if small_config(name).traits.global_tokens else (0,))
]
WITH_CONTEXTS = CASES + [
    pytest.param(name, replace(dims, context_length=context_length), id=f"{name}-context of {context_length}")
    for name in list_mixers(cross=True)
    for dims in forms(name)
    for context_length in (1, 21, 96)
    if dims.cross
]


def price(name: str, dims: Dims, length: int, dtype_bytes: int = 4) -> Cost:
    return small_config(name).cost(dims, length, dtype_bytes)


def mixer_and_inputs(
    name: str, dims: Dims, length: int, dtype: torch.dtype = torch.float32
) -> tuple[TokenMixer, tuple[Tensor, Tensor | None], Mask | None]:
    """A module in training, one sequence, a context and as many global tokens as are priced."""
    mixer = build_from_config(small_config(name), dims).to(dtype).train()
    x = torch.randn(1, length, dims.embed_dim, dtype=dtype, requires_grad=True)
    mask = Mask(global_tokens=(torch.arange(length) < dims.num_global)[None]) if dims.num_global else None
    shape = 1, dims.key_length(length), dims.embed_dim
    context = torch.randn(shape, dtype=dtype, requires_grad=True) if dims.cross else None
    return mixer, (x, context), mask


@pytest.mark.parametrize("length", [32, 64, 96])
@pytest.mark.parametrize(("name", "dims"), WITH_CONTEXTS)
def test_flops_are_those_that_are_counted(name: str, dims: Dims, length: int) -> None:
    mixer, inputs, mask = mixer_and_inputs(name, dims, length)
    assert price(name, dims, length).flops == counted_flops(lambda: mixer(*inputs, mask=mask))


@pytest.mark.parametrize(("dtype", "dtype_bytes"), [(torch.float32, 4), (torch.float64, 8)])
@pytest.mark.parametrize("length", [1, 29, 64])
@pytest.mark.parametrize(("name", "dims"), WITH_CONTEXTS)
def test_activation_bytes_are_those_that_autograd_saves(
    name: str, dims: Dims, length: int, dtype: torch.dtype, dtype_bytes: int
) -> None:
    mixer, inputs, mask = mixer_and_inputs(name, dims, length, dtype)
    context_bytes = 0 if inputs[1] is None else inputs[1].nbytes  # kept too, as x is, and priced with the encoder
    saved = saved_bytes(mixer, lambda: differentiated(mixer(*inputs, mask=mask)))
    assert price(name, dims, length, dtype_bytes).activation_bytes == saved - context_bytes


@pytest.mark.parametrize(("name", "dims"), WITH_CONTEXTS)
def test_activation_bytes_hold_in_bfloat16_within_two_percent(name: str, dims: Dims) -> None:
    mixer, inputs, mask = mixer_and_inputs(name, dims, 64, torch.bfloat16)
    context_bytes = 0 if inputs[1] is None else inputs[1].nbytes
    saved = saved_bytes(mixer, lambda: differentiated(mixer(*inputs, mask=mask)))
    assert price(name, dims, 64, 2).activation_bytes == pytest.approx(saved - context_bytes, rel=0.02)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "dims"), CASES)
def test_parameters_are_those_of_the_module(name: str, dims: Dims, bias: bool) -> None:
    dims = replace(dims, bias=bias)
    module = build_from_config(small_config(name), dims)
    assert price(name, dims, 10).parameters == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("name", "dims"), WITH_CONTEXTS)
def test_state_bytes_are_those_of_a_state_without_its_counters(name: str, dims: Dims) -> None:
    mixer, (x, context), _ = mixer_and_inputs(name, dims, 40)
    held = 0
    if mixer.config.traits.state and (dims.causal or dims.cross):
        state = mixer(x, context, state=mixer.init_state(1)).state
        assert state is not None
        tensors = [getattr(state, field.name) for field in fields(state)]
        held = sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
    assert price(name, dims, 40).state_bytes == held


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_growth_with_the_length_is_as_the_docstring_says(name: str, dims: Dims) -> None:
    documented = re.search(r"Cost O\(([^)]*)\)", importlib.import_module(MIXERS.lookup(name).__module__).__doc__ or "")
    assert documented is not None
    power = 2 if "L²" in documented[1] else 1
    length = 2**20
    once, twice = (price(name, replace(dims, max_length=longest), longest) for longest in (length, 2 * length))
    growth, logarithm = math.log2(twice.flops / once.flops), math.log2(21 / 20)  # log 2L / log L at L = 2**20
    if "log L" in documented[1]:
        assert power + 0.01 < growth < power + logarithm
    else:
        assert growth == pytest.approx(power, abs=0.01)
    assert math.log2(twice.activation_bytes / once.activation_bytes) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", list_mixers(bidirectional=True))
def test_nothing_is_priced_for_no_tokens_but_parameters(name: str) -> None:
    nothing = mixer_config(name).cost(make_dims(embed_dim=8, num_heads=2, max_length=10), 0, 4)
    assert nothing.flops == 0
    assert nothing.parameters > 0


@pytest.mark.parametrize("width", [384, 768])
@pytest.mark.parametrize(("linear_part", "widths"), [("feed-forward", 4), ("everything linear", 6)])
@pytest.mark.parametrize("causal", [False, True])
def test_dense_attention_overtakes_the_linear_parts_where_arithmetic_says(
    width: int, linear_part: str, widths: int, causal: bool
) -> None:
    """Scores cost 4 L² D (causal: 2 L (L + 1) D) against 16 L D² for the feed-forward and 8 L D² for projections."""
    dims = replace(WIDE_HEADS, embed_dim=width, num_heads=12, head_dim=width // 12, causal=causal)
    projections = projection_cost(dims, 1, 4).flops
    feed_forward = 4 * width * 4 * width
    linear = feed_forward + (projections if linear_part == "everything linear" else 0)

    def scores(length: int) -> int:
        return price("full", dims, length).flops - length * projections

    crossover = overtaking_length(scores, lambda length: length * linear)
    assert crossover == (2 * widths * width - 1 if causal else widths * width)
    assert (widths, width, causal, crossover) in {
        (4, 384, False, 1536),
        (6, 384, False, 2304),
        (4, 768, False, 3072),
        (6, 768, False, 4608),
        (4, 384, True, 3071),
        (6, 384, True, 4607),
        (4, 768, True, 6143),
        (6, 768, True, 9215),
    }


def test_the_counter_sees_only_visible_pairs() -> None:
    q = torch.randn(1, 2, 8, 4)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    attend = torch.nn.functional.scaled_dot_product_attention
    assert counted_flops(lambda: attend(q, q, q)) == 2 * 2 * 64 * 2 * 4
    assert counted_flops(lambda: attend(q, q, q, is_causal=True)) == 2 * 2 * 36 * 2 * 4
    assert counted_flops(lambda: attend(q, q, q, attn_mask=mask)) == 2 * 2 * 36 * 2 * 4


def test_the_meter_counts_a_storage_once_and_no_parameter() -> None:
    layer, x = torch.nn.Linear(3, 5), torch.randn(7, 3, requires_grad=True)
    assert saved_bytes(layer, lambda: layer(x) * layer(x.view(7, 3))) == 4 * (7 * 3 + 2 * 7 * 5)
