"""Proofs about masks and batches: padding has no effect, documents and examples don't mix, global tokens reach all."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from subquad.benchmark.probe_subject import (
    CONTEXT_LENGTH,
    EQUAL,
    EXACT,
    LENGTH,
    Finding,
    Inputs,
    Subject,
    at_most,
    call,
    difference,
    gradients,
    largest,
    some_segments,
    some_valid,
    worst,
)
from subquad.mask import Mask
from subquad.receipt import receipts

Side = Literal["left", "right"]


def padding_content(subject: Subject) -> Finding:
    """What padding holds changes no valid output and gets no gradient."""
    mixer, inputs = subject.mixer(), subject.inputs()
    valid, context_valid = some_valid(LENGTH), some_valid(CONTEXT_LENGTH)
    mask, context_mask = Mask(valid), Mask(context_valid) if subject.dims.cross else None
    y = call(mixer, inputs, mask, context_mask).y
    noise = subject.inputs(salt=1)
    moved = []
    for scale in (1.0, 1e3, float("nan")):
        x = torch.where(valid[..., None], inputs.x, scale * noise.x)
        context = None
        if inputs.context is not None and noise.context is not None:
            context = torch.where(context_valid[..., None], inputs.context, scale * noise.context)
        moved.append(largest([call(mixer, Inputs(x, context), mask, context_mask).y - y]))
    of_inputs, _ = gradients(mixer, inputs, torch.ones_like(valid), mask, context_mask)
    of_padding = largest([of_inputs.x[~valid]])
    if of_inputs.context is not None:
        of_padding = worst((of_padding, largest([of_inputs.context[~context_valid]])))
    if of_padding != 0:
        return Finding(False, f"padding gets a gradient of {of_padding:.1e}, expected exactly 0")
    return at_most(worst(moved), EXACT, "outputs after other padding, whose gradient is exactly 0")


def padding_output(subject: Subject) -> Finding:
    """The output at invalid positions is exactly 0 and lets no gradient through."""
    mixer, inputs, valid = subject.mixer(), subject.inputs(), some_valid(LENGTH)
    y = call(mixer, inputs, Mask(valid)).y
    of_inputs, of_parameters = gradients(mixer, inputs, ~valid, Mask(valid))
    through = largest(of_inputs.tensors() + of_parameters)
    held = largest([y[~valid]])
    return Finding(held == 0 and through == 0, f"invalid outputs hold {held:.1e} and pass a gradient of {through:.1e}")


def all_padding(subject: Subject) -> Finding:
    """An example of nothing but padding gives 0; it and an empty context leave all gradients finite."""
    mixer, inputs = subject.mixer(), subject.inputs()
    valid, context_valid = some_valid(LENGTH), some_valid(CONTEXT_LENGTH)
    valid[1] = False
    context_valid[0] = False
    mask, context_mask = Mask(valid), Mask(context_valid) if subject.dims.cross else None
    y = call(mixer, inputs, mask, context_mask).y
    of_inputs, of_parameters = gradients(mixer, inputs, torch.ones_like(valid), mask, context_mask)
    everything = [y, *of_parameters, *of_inputs.tensors()]
    if not all(bool(tensor.isfinite().all()) for tensor in everything):
        return Finding(False, "an example of padding alone, or an empty context, gives values that are not finite")
    return at_most(largest([y[1]]), 0.0, "output of an example of padding alone")


def padding_gap(subject: Subject, side: Side) -> float:
    """Largest difference between a sequence, and context, padded on one side and the same alone."""
    mixer, alone = subject.mixer(), subject.inputs(21)
    y = call(mixer, alone).y
    gaps = []
    for count in (1, 3, 16):
        garbage = subject.inputs(count, salt=1)
        places = slice(count, None) if side == "left" else slice(21)
        x, mask = _padded(alone.x, garbage.x, side)
        context, context_mask = alone.context, None
        if context is not None and garbage.context is not None:
            context, context_mask = _padded(context, garbage.context[:, :count], side)
        gaps.append(difference(call(mixer, Inputs(x, context), mask, context_mask).y[:, places], y))
    return worst(gaps)


def _padded(tokens: Tensor, garbage: Tensor, side: Side) -> tuple[Tensor, Mask]:
    pieces = (garbage, tokens) if side == "left" else (tokens, garbage)
    real = (torch.full(piece.shape[:2], piece is tokens) for piece in pieces)
    return torch.cat(pieces, dim=1), Mask(torch.cat(tuple(real), dim=1))


def padding_sides(subject: Subject) -> Finding:
    """A right-padded sequence gives what the sequence alone gives, unless structure is laid over the padded length.

    On the left the equality is described and not judged: grids of blocks and strides begin with the first token.
    """
    right, left = padding_gap(subject, "right"), padding_gap(subject, "left")
    structure = subject.config.padded_structure
    passed = right <= EQUAL if not structure else not math.isnan(right + left)
    excuse = f" (laid over the padded length: {structure})" if structure else ""
    sentence = f"right-padded against unpadded off by {right:.1e}{excuse}, left-padded by {left:.1e}"
    return Finding(passed, f"{sentence}, tolerance {EQUAL:.0e} on the right")


def batch(subject: Subject) -> Finding:
    """An example alone gives what it gives among others, however large those are."""
    mixer, inputs = subject.mixer(), subject.inputs()
    gaps = []
    for _, mask, context_mask in subject.mask_kinds():
        for row in range(3):
            others = torch.full((3, 1, 1), 100.0, dtype=torch.float64)
            others[row] = 1.0
            context = None if inputs.context is None else inputs.context * others
            together = call(mixer, Inputs(inputs.x * others, context), mask, context_mask).y
            context = None if inputs.context is None else inputs.context[row : row + 1]
            alone = Inputs(inputs.x[row : row + 1], context)
            expected = call(mixer, alone, _row(mask, row), _row(context_mask, row)).y
            gaps.append(difference(together[row : row + 1], expected))
    return at_most(worst(gaps), EQUAL, "an example alone against the same among others")


def _row(mask: Mask | None, row: int) -> Mask | None:
    return None if mask is None else mask.map(lambda fact: fact[row : row + 1])


def documents(subject: Subject) -> Finding:
    """Packed documents don't mix, in values and gradients, and give what each gives alone."""
    mixer, inputs = subject.mixer(), subject.inputs(batch=1)
    segments, context_segments = some_segments(LENGTH)[2:], some_segments(CONTEXT_LENGTH)[2:]
    mask = Mask(segments=segments)
    context_mask = Mask(segments=context_segments) if subject.dims.cross else None
    y = call(mixer, inputs, mask, context_mask).y
    noise, leaks, gaps = subject.inputs(batch=1, salt=1), [], []
    for document in segments.unique():
        own = segments == document
        own_context = context_segments == document
        x = torch.where(own[..., None], inputs.x, 1000 * noise.x)
        context = alone_context = None
        if inputs.context is not None and noise.context is not None:
            context = torch.where(own_context[..., None], inputs.context, 1000 * noise.context)
            alone_context = inputs.context[:, own_context[0]]
        leaks.append(largest([call(mixer, Inputs(x, context), mask, context_mask).y[own] - y[own]]))
        of_inputs, _ = gradients(mixer, inputs, own, mask, context_mask)
        leaks.append(largest([of_inputs.x[~own]]))
        if of_inputs.context is not None:
            leaks.append(largest([of_inputs.context[~own_context]]))
        gaps.append(difference(call(mixer, Inputs(inputs.x[:, own[0]], alone_context)).y, y[:, own[0]]))
    if not worst(leaks) <= EXACT:
        return Finding(False, f"documents mix: values or gradients move by {worst(leaks):.1e}, tolerance {EXACT:.0e}")
    return at_most(worst(gaps), EQUAL, "packed documents against each alone")


def global_tokens(subject: Subject) -> Finding:
    """A global token sees, and is seen by, all that causality allows; where the trait is False a receipt says so."""
    mixer, inputs, place = subject.mixer(), subject.inputs(batch=1), 7
    marked = torch.zeros(1, LENGTH, dtype=torch.bool)
    marked[0, place] = True
    if not subject.config.traits.global_tokens:
        plain = call(mixer, inputs).y
        with receipts() as collected:
            ignored = call(mixer, inputs, Mask(global_tokens=marked)).y
        noted = [receipt for receipt in collected.entries if receipt.asked == "global_tokens"]
        same = torch.equal(plain, ignored)
        return Finding(bool(noted) and same, f"ignored: output unchanged is {same}, receipts left: {len(noted)}")
    mask = Mask(global_tokens=marked)
    sees = gradients(mixer, inputs, marked, mask)[0].x[0].abs().amax(dim=1) > 0
    each = Inputs(inputs.x.expand(LENGTH, -1, -1), None)  # example b asks what moves the output of token b
    of_each, _ = gradients(
        mixer, each, torch.eye(LENGTH, dtype=torch.bool), Mask(global_tokens=marked.expand(LENGTH, -1))
    )
    seen = of_each.x[:, place].abs().amax(dim=1) > 0
    places = torch.arange(LENGTH)
    may_see = places <= place if subject.dims.causal else places >= 0
    may_be_seen = places >= place if subject.dims.causal else places >= 0
    good = torch.equal(sees, may_see) and torch.equal(seen, may_be_seen)
    return Finding(good, f"a global token sees {int(sees.sum())} and is seen by {int(seen.sum())} of {LENGTH} tokens")
