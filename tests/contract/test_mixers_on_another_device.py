"""Every mechanism computes on whichever device its inputs lie on, and the same as on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from another_device import another_device, here, there
from cases import WIDE_HEADS, accepted_forms, form_of, small_config, subjects
from option_configs import CONFIGS
from torch import Tensor, nn

from subquad.benchmark.probe_subject import EQUAL, Inputs, Subject, difference
from subquad.build import build_feedforward, build_from_config, list_feedforwards, list_mixers
from subquad.mask import Mask

SUBJECTS = subjects()
OF_OPTIONS = {
    f"{number}-{config.name}-{form_of(dims)}": Subject(config, dims, config)
    for number, config in enumerate(CONFIGS)
    for dims in accepted_forms(config)
}


def mask_there(mask: Mask | None) -> Mask | None:
    return None if mask is None else mask.map(there)


def step(module: nn.Module, inputs: Inputs, **masks: Mask | None) -> dict[str, Tensor]:
    """Result, loss and all gradients, by name."""
    leaves = inputs.map(lambda x: x.requires_grad_())
    torch.manual_seed(3)
    mixed = module(*leaves.tensors(), **masks)
    weights = torch.linspace(-1, 1, mixed.y.numel(), dtype=mixed.y.dtype, device=mixed.y.device).view_as(mixed.y)
    total = (mixed.y * weights).sum()
    (total if mixed.aux_loss is None else total + mixed.aux_loss).backward()
    found = {"y": mixed.y} | ({} if mixed.aux_loss is None else {"auxiliary loss": mixed.aux_loss})
    found |= {f"input {number}": x.grad for number, x in enumerate(leaves.tensors()) if x.grad is not None}
    return found | {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in here(found).items():
        assert difference(x, expected[name].detach()) <= EQUAL, name


def assert_step_is_that_of_the_cpu(
    subject: Subject, mask: Mask | None, context_mask: Mask | None, *, training: bool
) -> None:
    module = subject.mixer().train(training)
    expected = step(module, subject.inputs(), mask=mask, context_mask=context_mask)
    with another_device():
        moved = there(subject.mixer().train(training))
        masks = {"mask": mask_there(mask), "context_mask": mask_there(context_mask)}
        found = step(moved, subject.inputs().map(there), **masks)
    assert_equal(found, expected)


@pytest.mark.parametrize("label", SUBJECTS)
def test_training_takes_the_same_step_as_on_the_cpu(label: str) -> None:
    for _, mask, context_mask in SUBJECTS[label].mask_kinds():
        assert_step_is_that_of_the_cpu(SUBJECTS[label], mask, context_mask, training=True)


@pytest.mark.parametrize("label", SUBJECTS)
def test_evaluation_gives_the_same_as_on_the_cpu(label: str) -> None:
    assert_step_is_that_of_the_cpu(SUBJECTS[label], None, None, training=False)


@pytest.mark.slow
@pytest.mark.parametrize("label", OF_OPTIONS)
def test_with_other_options_too(label: str) -> None:
    *_, (_, mask, context_mask) = OF_OPTIONS[label].mask_kinds()
    assert_step_is_that_of_the_cpu(OF_OPTIONS[label], mask, context_mask, training=True)


FORMS = [
    *((name, "causal") for name in list_mixers(state=True, causal=True)),
    *((name, "cross") for name in list_mixers(state=True, cross=True)),
]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_states_live_where_the_inputs_do(name: str, form: str) -> None:
    dims = replace(WIDE_HEADS, causal=form == "causal", cross=form == "cross")
    torch.manual_seed(0)
    mixer = build_from_config(small_config(name), dims).double().eval()
    x, context = torch.randn(2, 12, 24).double(), torch.randn(2, 5, 24).double() if dims.cross else None
    valid = torch.arange(9) < torch.tensor([[9], [6]])

    def stream(x: Tensor, context: Tensor | None, valid: Tensor) -> list[Tensor]:
        with torch.no_grad():
            y, state, _ = mixer(x[:, :9], context, mask=Mask(valid), state=mixer.init_state(2))
            found = [y]
            for i in range(9, 12):
                y, state, _ = mixer(x[:, i : i + 1], state=state)
                found.append(y)
        return found

    expected = stream(x, context, valid)
    with another_device():
        there(mixer)
        found = stream(there(x), there(context), there(valid))
    for got, exact in zip(here(found), expected, strict=True):
        assert difference(got, exact) <= EQUAL


@pytest.mark.parametrize("name", list_feedforwards())
def test_feedforwards_too(name: str) -> None:
    torch.manual_seed(0)
    module, x = build_feedforward(name, embed_dim=16).double(), torch.randn(2, 9, 16).double()
    expected = step(module, Inputs(x, None))
    module.zero_grad()
    with another_device():
        found = step(there(module), Inputs(there(x), None))
    assert_equal(found, expected)
