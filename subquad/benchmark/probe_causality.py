"""Proofs about time: no token sees the future, and a stream continued through its state equals the whole.

Perturbations are large, because a leak through a stabiliser or an epsilon is invisible to small ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from subquad.benchmark.probe_subject import (
    EQUAL,
    EXACT,
    LENGTH,
    Finding,
    Inputs,
    Subject,
    at_most,
    call,
    difference,
    largest,
    miniature,
    worst,
)
from subquad.interface import TokenMixer
from subquad.mask import Mask
from subquad.state import State

_CUTS = (1, 2, 5, 13, 22, LENGTH - 1)
_PARTITIONS = ((1,) * LENGTH, (5, 1, 17, 14), (36, 1))


def future(subject: Subject) -> Finding:
    """What comes after a token doesn't change its output: tokens x 1000, noise, one huge key, other padding."""
    mixer, (x, _) = subject.mixer(), subject.inputs()
    moved = []
    for _, mask, _ in subject.mask_kinds():
        y = call(mixer, Inputs(x, None), mask).y
        for cut in _CUTS:
            for changed, changed_mask in _other_futures(subject, x, mask, cut):
                y_changed = call(mixer, Inputs(changed, None), changed_mask).y
                moved.append(largest([y_changed[:, :cut] - y[:, :cut]]))
    return at_most(worst(moved), EXACT, "outputs before a change of the future")


def _other_futures(subject: Subject, x: Tensor, mask: Mask | None, cut: int) -> list[tuple[Tensor, Mask | None]]:
    noise = subject.inputs(salt=1).x * 1000
    past = (torch.arange(LENGTH) < cut)[:, None]
    last = torch.zeros(LENGTH, 1, dtype=torch.bool)
    last[-1] = True
    futures = [(torch.where(past, x, 1000 * x), mask), (torch.where(past, x, noise), mask)]
    futures += [(torch.where(last, sign * 1e4 * x.sign(), x), mask) for sign in (1, -1)]
    if mask is not None and mask.valid is not None:
        futures.append((x, replace(mask, valid=mask.valid ^ ~past[:, 0])))
    return futures


def prefix(subject: Subject) -> Finding:
    """f(x)[:t] == f(x[:t]) at lengths that are no multiples of a block."""
    mixer, (x, _) = subject.mixer(), subject.inputs()
    gaps = []
    for _, mask, _ in subject.mask_kinds():
        y = call(mixer, Inputs(x, None), mask).y
        for cut in _CUTS:
            alone = call(mixer, Inputs(x[:, :cut], None), cut_mask(mask, 0, cut)).y
            gaps.append(difference(alone, y[:, :cut]))
    return at_most(worst(gaps), EQUAL, "output of a prefix against the prefix of the output")


def partition(subject: Subject) -> Finding:
    """A stream cut into calls, token by token too, gives what one call gives; padding takes no part."""
    mixer, inputs = subject.mixer(), subject.inputs()
    gaps = []
    for label, mask, context_mask in _stream_kinds(subject):
        y = call(mixer, inputs, mask, context_mask).y
        valid = torch.ones(3, LENGTH) if mask is None or mask.valid is None else mask.valid
        for pieces in ((LENGTH,), *_PARTITIONS):
            streamed, state = _stream(mixer, inputs, pieces, mask, context_mask)
            gaps.append(difference(streamed, y))
            if not torch.equal(state.length, valid.sum(dim=1).long()):
                expected = valid.sum(dim=1).long().tolist()
                return Finding(False, f"state.length{label} is {state.length.tolist()}, expected {expected}")
    return at_most(worst(gaps), EQUAL, "a stream in pieces against one call")


def rows(subject: Subject) -> Finding:
    """Reordered and repeated rows of a state continue their own streams."""
    mixer, inputs = subject.mixer(), subject.inputs()
    order = torch.tensor([2, 0, 0])
    gaps = []
    for _, mask, context_mask in _stream_kinds(subject):
        y = call(mixer, inputs, mask, context_mask).y
        _, state = _stream(mixer, inputs, (14,), mask, context_mask)
        rest = Inputs(inputs.x[order, 14:], None)
        rest_mask = cut_mask(mask, 14, LENGTH)
        chosen = None if rest_mask is None else rest_mask.map(lambda fact: fact[order])
        gaps.append(difference(call(mixer, rest, chosen, None, state.index_select(order)).y, y[order, 14:]))
    return at_most(worst(gaps), EQUAL, "streams continued from reordered rows")


def state_kept(subject: Subject) -> Finding:
    """A call doesn't modify the state it was given, and a state can be continued twice."""
    mixer, inputs = subject.mixer(), subject.inputs()
    _, state = _stream(mixer, inputs, (14,), None, None)
    before = {field.name: getattr(state, field.name).clone() for field in fields(state)}
    rest = Inputs(inputs.x[:, 14:], None)
    first, second = (call(mixer, rest, None, None, state).y for _ in range(2))
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, getattr(state, name))]
    if changed:
        return Finding(False, f"a call modified the state it was given: {', '.join(changed)}")
    return at_most(largest([first - second]), 0.0, "two continuations of one state")


def state_size(subject: Subject) -> Finding:
    """`constant_state`: the state of a causal form stops growing, or, where the trait is False, it doesn't."""
    short = replace(subject, config=miniature(subject.asked, memories=True))
    mixer, (x, _) = short.mixer(), short.inputs(64)
    _, early = _stream(mixer, Inputs(x, None), (48,), None, None)
    late = call(mixer, Inputs(x[:, 48:], None), None, None, early).state
    assert late is not None
    stops = late.nbytes == early.nbytes
    sizes = f"{early.nbytes} bytes after 48 tokens, {late.nbytes} after 64"
    claimed = subject.config.traits.constant_state
    return Finding(stops == claimed, f"constant_state={claimed}: {sizes}")


def _stream_kinds(subject: Subject) -> list[tuple[str, Mask | None, Mask | None]]:
    """The kinds of masks; rotary positions inside the segments of a cross-attention stream are refused."""
    refused = subject.dims.cross and subject.dims.positions == "rotary"
    kinds = subject.mask_kinds()
    return [kind for kind in kinds if not (refused and kind[1] is not None and kind[1].segments is not None)]


def _stream(
    mixer: TokenMixer, inputs: Inputs, pieces: Sequence[int], mask: Mask | None, context_mask: Mask | None
) -> tuple[Tensor, State]:
    """The outputs of calls of the given sizes, joined, and the last state."""
    state = mixer.init_state(inputs.x.shape[0])
    outputs, start = [], 0
    for size in pieces:
        stop = start + size
        first = start == 0
        part = Inputs(inputs.x[:, start:stop], inputs.context if first else None)
        mixed = call(mixer, part, cut_mask(mask, start, stop), context_mask if first else None, state)
        assert mixed.state is not None
        state = mixed.state
        outputs.append(mixed.y)
        start = stop
    return torch.cat(outputs, dim=1), state


def cut_mask(mask: Mask | None, start: int, stop: int) -> Mask | None:
    """The facts about the tokens start..stop-1."""
    return None if mask is None else mask.map(lambda fact: fact[:, start:stop])
