"""Proofs about numbers: gradients, extreme inputs, narrow dtypes, determinism, sizes and refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.autograd import gradcheck

from subquad.benchmark.probe_subject import (
    LENGTH,
    MAX_LENGTH,
    Finding,
    Inputs,
    Subject,
    at_most,
    call,
    difference,
    gradients,
    largest,
    some_segments,
)
from subquad.build import build_from_config
from subquad.interface import TokenMixer
from subquad.mask import Mask
from subquad.state import State

_DTYPES = ((torch.float32, 1e-4), (torch.bfloat16, 5e-2))
ROUNDINGS = 4
"""By which inputs move to find choices that hang on a rounding: about as many as lie between x and a score."""
MOVEMENTS = 8
"""Ways in which they move; a choice between equals then turns in nearly all cases."""


def gradient(subject: Subject) -> Finding:
    """Analytic gradients of the inputs and all parameters equal numerical ones."""
    inputs = subject.inputs(6, batch=2)
    mask = Mask.from_lengths([6, 4], 6) if subject.config.traits.padding else None
    mixer = subject.mixer()
    names, parameters = zip(*mixer.named_parameters(), strict=True)

    count = len(inputs.tensors())

    def forward(*values: Tensor) -> Tensor:
        named = dict(zip(names, values[count:], strict=True))
        return torch.func.functional_call(mixer, named, values[:count], {"mask": mask}).y

    leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in (*inputs.tensors(), *parameters))
    gradcheck(forward, leaves, fast_mode=True, eps=1e-6, atol=1e-5, rtol=1e-4)  # raises where it fails
    return Finding(True, f"numerical and analytic gradients of x and {len(names)} parameters agree, tolerance 1e-5")


def extremes(subject: Subject) -> Finding:
    """Huge, equal and zero inputs give finite outputs and gradients in float32."""
    mixer, inputs = subject.mixer(dtype=torch.float32), subject.inputs()
    cases: dict[str, Callable[[Tensor], Tensor]] = {
        "inputs x 1000": lambda x: 1000 * x,
        "equal inputs": lambda x: x[:, :1].expand_as(x),
        "zeros": torch.zeros_like,
        "one huge token": lambda x: torch.where((torch.arange(x.shape[1]) == 9)[:, None], 1e4 * x, x),
    }
    bad = []
    for label, change in cases.items():
        changed = inputs.map(change).map(Tensor.float)
        of_inputs, of_parameters = gradients(mixer, changed, torch.ones(3, LENGTH, dtype=torch.bool))
        everything = [call(mixer, changed).y, *of_parameters, *of_inputs.tensors()]
        if not all(bool(tensor.isfinite().all()) for tensor in everything):
            bad.append(label)
    return Finding(not bad, f"outputs and gradients are not finite for: {', '.join(bad)}" if bad else _finite(cases))


def _finite(cases: dict[str, Callable[[Tensor], Tensor]]) -> str:
    return f"outputs and gradients are finite for {', '.join(cases)}"


def dtypes(subject: Subject) -> Finding:
    """float32 and bfloat16 are close to float64 with the same rounded numbers; y has x's dtype; states are wide."""
    details = []
    for dtype, tolerance in _DTYPES:
        narrow = subject.mixer(dtype=dtype)
        inputs = _cast(subject.inputs(), dtype)
        exact = copy.deepcopy(narrow).double()
        expected, y = call(exact, inputs.map(Tensor.double)).y, call(narrow, inputs).y
        if y.dtype != dtype:
            return Finding(False, f"x is {dtype} but y is {y.dtype}")
        if narrow_state := _narrow_state(subject, narrow, inputs):
            return Finding(False, f"with {dtype} the state holds {narrow_state}, expected float32 or wider")
        error = excess_error(y, expected, [call(exact, moved).y for moved in moved_inputs(inputs, dtype)])
        details.append(f"{str(dtype).removeprefix('torch.')} off by {error:.1e}, tolerance {tolerance:.0e}")
        if not error <= tolerance:
            return Finding(False, details[-1])
    return Finding(True, f"relative to float64: {'; '.join(details)}")


def excess_error(got: Tensor, expected: Tensor, moved: list[Tensor]) -> float:
    """How far off the worst token is, relative to a token's root mean square norm.

    Rounding may turn a discrete choice between near equals (a largest score, a bucket), and then no arithmetic comes
    close. So a token counts only as far as it is off by more than the exact result itself moves, at most, when the
    inputs do by some roundings (`moved`); but no more than one token in four has this excuse.
    """
    size = (expected.norm() / expected[..., 0].numel() ** 0.5).clamp_min(1e-6)
    error = (got.double() - expected).norm(dim=-1)
    movement = torch.stack([(other - expected).norm(dim=-1) for other in moved]).amax(dim=0)
    return float(torch.maximum((error - movement).max(), error.quantile(0.75)) / size)


def moved_inputs(inputs: Inputs, dtype: torch.dtype) -> list[Inputs]:
    """The inputs in float64, each number off by up to `ROUNDINGS` roundings of `dtype`, in several ways."""
    generator = torch.Generator().manual_seed(0)

    def move(tensor: Tensor) -> Tensor:
        noise = 2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1
        return tensor.double() * (1 + ROUNDINGS * torch.finfo(dtype).eps * noise)

    return [inputs.map(move) for _ in range(MOVEMENTS)]


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return inputs.map(lambda tensor: tensor.to(dtype))


def _narrow_state(subject: Subject, mixer: TokenMixer, inputs: Inputs) -> str:
    """The dtypes narrower than float32 in a fresh state and in one after a call."""
    if not (subject.config.traits.state and (subject.dims.causal or subject.dims.cross)):
        return ""
    fresh = mixer.init_state(3)
    return ", ".join(str(dtype) for dtype in _floating(fresh) | _floating(call(mixer, inputs, state=fresh).state))


def _floating(state: State | None) -> set[torch.dtype]:
    assert state is not None
    tensors = [getattr(state, field.name) for field in fields(state)]
    return {t.dtype for t in tensors if t.is_floating_point() and torch.finfo(t.dtype).bits < 32}


def determinism(subject: Subject) -> Finding:
    """In evaluation two calls give the same bits."""
    mixer, inputs = subject.mixer(), subject.inputs()
    return at_most(largest([call(mixer, inputs).y - call(mixer, inputs).y]), 0.0, "two calls in evaluation")


def longest(subject: Subject) -> Finding:
    """`fixed_length`: longer input is refused; where the trait is False, max_length changes nothing."""
    if subject.config.traits.fixed_length:
        for length in (MAX_LENGTH, MAX_LENGTH + 1):
            try:
                call(subject.mixer(), subject.inputs(length, batch=1))
            except ValueError as error:
                return Finding(length > MAX_LENGTH, f"length {length} is refused: {error}")
        return Finding(False, f"length {MAX_LENGTH + 1} is accepted with max_length={MAX_LENGTH}")
    short, long = (replace(subject, dims=replace(subject.dims, max_length=bound)) for bound in (LENGTH - 1, MAX_LENGTH))
    gap = difference(call(short.mixer(), short.inputs()).y, call(long.mixer(), long.inputs()).y)
    return at_most(gap, 0.0, f"max_length {LENGTH - 1} against {MAX_LENGTH} at length {LENGTH}")


def auxiliary_loss(subject: Subject) -> Finding:
    """None in evaluation; in training a float32 scalar where the trait is True, and None where it is False."""
    mixer, inputs, claimed = subject.mixer(), subject.inputs(), subject.config.traits.aux_loss
    if call(mixer, inputs).aux_loss is not None:
        return Finding(False, "an auxiliary loss is returned in evaluation")
    loss = call(mixer.train(), inputs).aux_loss
    if loss is None:
        return Finding(not claimed, f"aux_loss={claimed}: none in training and evaluation")
    fits = claimed and loss.ndim == 0 and loss.dtype == torch.float32
    return Finding(fits, f"aux_loss={claimed}: in training {loss.dtype} of shape {tuple(loss.shape)}")


def refusals(subject: Subject) -> Finding:
    """What a False trait stands for is refused with a ValueError, when built or when called."""
    mixer, inputs, dims = subject.mixer(), subject.inputs(), subject.dims
    x, context = inputs
    state = State(torch.zeros(3, dtype=torch.int64))
    attempts: dict[str, Callable[[], object]] = {
        "causal": lambda: build_from_config(subject.config, replace(dims, causal=True, cross=False)),
        "bidirectional": lambda: build_from_config(subject.config, replace(dims, causal=False, cross=False)),
        "cross": lambda: build_from_config(subject.config, replace(dims, causal=False, cross=True)),
        "padding": lambda: mixer(x, context, mask=Mask.from_lengths([LENGTH, 5, 1], LENGTH)),
        "segments": lambda: mixer(x, context, mask=Mask(segments=some_segments(LENGTH))),
        "state": lambda: (mixer.init_state(3), mixer(x, context, state=state)),
    }
    lacking = [trait for trait in attempts if not getattr(subject.config.traits, trait)]
    accepted = [trait for trait in lacking if not _refused(attempts[trait])]
    if accepted:
        return Finding(False, f"not offered, and yet accepted without an error: {', '.join(accepted)}")
    return Finding(True, f"refused with a ValueError, as the traits say: {', '.join(lacking) or 'nothing to refuse'}")


def _refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except ValueError:
        return True
    return False


def parameter_count(subject: Subject) -> Finding:
    """`cost` knows the number of parameters."""
    counted = sum(parameter.numel() for parameter in subject.mixer().parameters())
    priced = subject.config.cost(subject.dims, LENGTH, 4).parameters
    return Finding(counted == priced, f"{counted} parameters, the cost says {priced}")
