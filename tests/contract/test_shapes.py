"""Any length, batch and padding: y has the shape and dtype of x, is finite, and is 0 at invalid positions."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from cases import accepted_forms, form_of, forms, small_config
from hypothesis import given
from hypothesis import strategies as st
from test_option_cost import CONFIGS
from torch import Tensor

from subquad import Mask
from subquad.benchmark.probe_numerics import excess_error, moved_inputs
from subquad.benchmark.probe_subject import Inputs, call
from subquad.build import build_from_config, list_mixers
from subquad.interface import Dims, MixerConfig

CASES = [pytest.param(name, dims, id=f"{name}-{form_of(dims)}") for name in list_mixers() for dims in forms(name)]
CASES_OF_OPTIONS = [
    pytest.param(config, dims, id=f"{config!r}-{form_of(dims)}")
    for config in (*map(small_config, list_mixers()), *CONFIGS)
    for dims in accepted_forms(config)
]
LENGTHS = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 31, 32, 33, 70])


@st.composite
def masks(draw: st.DrawFn, batch: int, length: int) -> torch.Tensor:
    """Padding of any kind: none, on the right, on the left, holes, everything."""
    rows = []
    for _ in range(batch):
        kind = draw(st.sampled_from(["none", "right", "left", "holes", "all"]))
        count = draw(st.integers(0, length))
        row = torch.ones(length, dtype=torch.bool)
        if kind == "right":
            row[count:] = False
        elif kind == "left":
            row[:count] = False
        elif kind == "holes":
            row = torch.rand(length, generator=torch.Generator().manual_seed(count)) < 0.6
        elif kind == "all":
            row[:] = False
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize(("name", "dims"), CASES)
@given(data=st.data(), length=LENGTHS, source_length=LENGTHS, batch=st.integers(1, 3))
def test_any_shape_and_padding_is_served(
    name: str, dims: Dims, data: st.DataObject, length: int, source_length: int, batch: int
) -> None:
    mixer = build_from_config(small_config(name), dims)
    x = torch.randn(batch, length, dims.embed_dim, requires_grad=True)
    context = torch.randn(batch, source_length, dims.embed_dim) if dims.cross else None
    mask = context_mask = None
    if mixer.config.traits.padding:
        mask = Mask(data.draw(masks(batch, length)))
        context_mask = Mask(data.draw(masks(batch, source_length))) if dims.cross else None
    y, state, _ = mixer(x, context, mask=mask, context_mask=context_mask)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert state is None
    assert bool(y.isfinite().all())
    if mask is not None and mask.valid is not None:
        assert not y[~mask.valid].any()
    y.square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in mixer.parameters())]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)


@pytest.mark.parametrize(("config", "dims"), CASES_OF_OPTIONS)
def test_an_empty_batch_gives_an_empty_batch_and_no_gradients(config: MixerConfig, dims: Dims) -> None:
    mixer = build_from_config(config, dims)
    for mask in (None, Mask(torch.ones(0, 9, dtype=torch.bool)))[: 2 if config.traits.padding else 1]:
        x = torch.randn(0, 9, dims.embed_dim, requires_grad=True)
        context, context_mask = (x, mask) if dims.cross else (None, None)
        mixed = [mixer(x, context, mask=mask, context_mask=context_mask)]
        if config.traits.state and (dims.causal or dims.cross):
            mixed.append(mixer(x, context, mask=mask, context_mask=context_mask, state=mixer.init_state(0)))
            mixed.append(mixer(x, mask=mask, state=mixed[-1].state))
        assert all(y.shape == x.shape for y, _, _ in mixed)
        losses = [y.sum() + (0 if aux_loss is None else aux_loss) for y, _, aux_loss in mixed]
        torch.stack(losses).sum().backward()
        assert x.grad is not None
        assert not any(bool(parameter.grad.any()) for parameter in mixer.parameters() if parameter.grad is not None)
        assert all(bool(buffer.isfinite().all()) for buffer in mixer.buffers())


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_inputs_are_not_modified_and_may_have_any_strides(name: str, dims: Dims) -> None:
    mixer = build_from_config(small_config(name), dims).eval()
    x = torch.randn(dims.embed_dim, 9, 2).permute(2, 1, 0)
    context = torch.randn(dims.embed_dim, 7, 2).permute(2, 1, 0) if dims.cross else None
    before = x.clone()
    strided = mixer(x, context).y
    dense = mixer(x.contiguous(), None if context is None else context.contiguous()).y
    torch.testing.assert_close(strided, dense)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_dropout_acts_in_training_alone(name: str, dims: Dims) -> None:
    mixer = build_from_config(small_config(name), replace(dims, dropout=0.5))
    x = torch.randn(2, 9, dims.embed_dim)
    context = x if dims.cross else None
    first, second = (mixer.train()(x, context).y for _ in range(2))
    if mixer.config.placement == "sublayer":
        assert 0.3 < float((first == 0).float().mean()) < 0.7
    assert not torch.equal(first, second)  # a block may drop what it adds to the stream
    assert not (mixer.eval()(x, context).y == 0).any()


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_a_module_saved_and_loaded_gives_the_same_bits(name: str, dims: Dims) -> None:
    first, second = (build_from_config(small_config(name), dims).eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 9, dims.embed_dim)
    context = x if dims.cross else None
    assert torch.equal(first(x, context).y, second(x, context).y)
    assert repr(first.config) in repr(first)


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_autocast_stays_close_and_returns_the_dtype_of_x(name: str, dims: Dims) -> None:
    mixer = build_from_config(small_config(name), dims).eval()
    inputs = Inputs(torch.randn(2, 40, dims.embed_dim), torch.randn(2, 30, dims.embed_dim) if dims.cross else None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(*inputs).y
    assert y.dtype == torch.float32
    exact = copy.deepcopy(mixer).double()
    moved = [call(exact, others).y for others in moved_inputs(inputs, torch.bfloat16)]
    assert excess_error(y.detach(), call(exact, inputs.map(Tensor.double)).y, moved) < 0.05
    y.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in mixer.parameters() if p.grad is not None)
