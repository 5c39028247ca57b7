"""States are values: pytrees of batch-first tensors that can be selected, moved, detached and weighed."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from cases import WIDE_HEADS, small_config
from torch.utils import _pytree as pytree

from subquad.build import build_from_config, list_mixers
from subquad.interface import TokenMixer
from subquad.state import State

FORMS = [
    *((name, "causal") for name in list_mixers(state=True, causal=True)),
    *((name, "cross") for name in list_mixers(state=True, cross=True)),
]


@pytest.fixture(params=FORMS, ids=["-".join(form) for form in FORMS])
def mixer(request: pytest.FixtureRequest) -> TokenMixer:
    name, form = request.param
    return build_from_config(small_config(name), replace(WIDE_HEADS, causal=form == "causal", cross=form == "cross"))


def stops_gradients(mixer: TokenMixer) -> bool:
    """Whether the paper cuts the graph at what the state holds."""
    return mixer.config.name in ("compressive", "transformer_xl")


def after_some_tokens(mixer: TokenMixer) -> State:
    x = torch.randn(3, 9, 24)
    state = mixer(x, torch.randn(3, 6, 24) if mixer.dims.cross else None, state=mixer.init_state(3)).state
    assert state is not None
    return state


def test_a_fresh_state_has_seen_nothing_and_has_the_batch_first(mixer: TokenMixer) -> None:
    state = mixer.init_state(5)
    assert state.length.tolist() == [0] * 5
    assert state.length.dtype == torch.int64
    assert all(getattr(state, field.name).shape[0] == 5 for field in fields(state))


@pytest.mark.parametrize(
    ("of_parameters", "asked", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, None, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_a_state_is_as_wide_as_the_parameters_and_never_narrower_than_float32(
    mixer: TokenMixer, of_parameters: torch.dtype, asked: torch.dtype | None, expected: torch.dtype
) -> None:
    state = mixer.to(of_parameters).init_state(2, dtype=asked)
    tensors = [getattr(state, field.name) for field in fields(state)]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {expected}


def test_a_state_is_made_where_it_is_asked_for(mixer: TokenMixer) -> None:
    assert {tensor.device.type for tensor in pytree.tree_leaves(mixer.init_state(2, device="meta"))} == {"meta"}


def test_a_state_is_a_pytree_of_its_tensors(mixer: TokenMixer) -> None:
    state = after_some_tokens(mixer)
    leaves, spec = pytree.tree_flatten(state)
    assert [leaf.shape for leaf in leaves] == [getattr(state, field.name).shape for field in fields(state)]
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(state)
    doubled = pytree.tree_map(lambda tensor: tensor + tensor, state)
    assert doubled.length.tolist() == [18, 18, 18]


def test_rows_are_selected_in_order_and_with_repetitions(mixer: TokenMixer) -> None:
    state = after_some_tokens(mixer)
    rows = torch.tensor([2, 0, 0, 1])
    chosen = state.index_select(rows)
    for field in fields(state):
        assert torch.equal(getattr(chosen, field.name), getattr(state, field.name)[rows])


def test_detach_cuts_the_graph_and_keeps_the_values(mixer: TokenMixer) -> None:
    state = after_some_tokens(mixer)
    assert any(tensor.requires_grad for tensor in pytree.tree_leaves(state)) != stops_gradients(mixer)
    detached = state.detach()
    assert not any(tensor.requires_grad for tensor in pytree.tree_leaves(detached))
    assert all(map(torch.equal, pytree.tree_leaves(detached), pytree.tree_leaves(state)))


def test_to_changes_only_what_is_floating_point(mixer: TokenMixer) -> None:
    state = after_some_tokens(mixer)
    moved = state.to("cpu", torch.float64)
    for field in fields(state):
        before, after = getattr(state, field.name), getattr(moved, field.name)
        assert after.dtype == (torch.float64 if before.is_floating_point() else before.dtype)


def test_nbytes_adds_all_tensors(mixer: TokenMixer) -> None:
    state = after_some_tokens(mixer)
    assert state.nbytes == sum(t.numel() * t.element_size() for t in pytree.tree_leaves(state)) > 0


def test_a_state_is_frozen(mixer: TokenMixer) -> None:
    with pytest.raises(FrozenInstanceError):
        mixer.init_state(1).length = torch.ones(1)  # pyright: ignore[reportAttributeAccessIssue] - the point


def test_gradients_flow_through_a_state_unless_the_paper_stops_them(mixer: TokenMixer) -> None:
    first, second = torch.randn(2, 4, 24, requires_grad=True), torch.randn(2, 4, 24)
    source = torch.randn(2, 6, 24, requires_grad=True) if mixer.dims.cross else None
    state = mixer(first, source, state=mixer.init_state(2)).state
    mixer(second, state=state).y.sum().backward()
    told = source if source is not None else first
    assert (told.grad is not None and bool(told.grad.any())) != stops_gradients(mixer)


def test_without_a_state_none_is_returned(mixer: TokenMixer) -> None:
    x = torch.randn(2, 4, 24)
    assert mixer(x, x if mixer.dims.cross else None).state is None
