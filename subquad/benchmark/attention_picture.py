"""Who attends whom, read off the Jacobian: token i depends on token j where ∂y_i/∂x_j is not 0.

It shows what a mechanism does and not what its description says, works for every mechanism, attention or not, and costs
one forward and one backward pass. Block mixers show their residual and norm too. Cross-attention: j runs over the
context, as many tokens as queries. Mechanisms with global tokens are drawn with the first token global.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from subquad.benchmark.probe_subject import Subject, miniature, small_subject
from subquad.interface import Dims, MixerConfig
from subquad.mask import Mask


def attention_picture(
    config: MixerConfig, dims: Dims, length: int, *, shrink: bool = True, seed: int = 0
) -> list[list[bool]]:
    """Row i, column j: whether the output of token i depends on token j, for any of two random inputs.

    Args:
        config: the mechanism.
        dims: the form; widths don't matter and are made small.
        length: number of tokens.
        shrink: shrink windows, blocks and ranks too, so that their structure fits a short sequence.
        seed: of parameters and inputs.

    Raises:
        ValueError: a form that the mechanism doesn't have, or a length below 1.
    """
    strength = attention_strength(config, dims, length, shrink=shrink, seed=seed)
    return [[value > 0 for value in row] for row in strength]


def attention_strength(
    config: MixerConfig, dims: Dims, length: int, *, shrink: bool = True, seed: int = 0
) -> list[list[float]]:
    """Row i, column j: how much the output of token i moves with token j, relative to the largest in its row, 0 to 1.

    Arguments and errors as in `attention_picture`. A row that depends on nothing is 0.
    """
    if length < 1:
        raise ValueError(f"attention_picture: length must be at least 1, got {length}")
    subject = small_subject(config, replace(dims, max_length=None), seed=seed)
    bound = length if subject.dims.max_length is not None else None
    chosen = miniature(config) if shrink else config
    subject = replace(subject, config=chosen, dims=replace(subject.dims, max_length=bound))
    strength = sum(_jacobian(subject, length, salt) for salt in range(2))
    assert isinstance(strength, torch.Tensor)
    relative = strength / strength.amax(dim=1, keepdim=True).clamp_min(torch.finfo(strength.dtype).tiny)
    return relative.tolist()


def _first_is_global(subject: Subject, x: torch.Tensor) -> Mask | None:
    """A mechanism with global tokens is drawn with one, the first."""
    if not subject.config.traits.global_tokens or subject.dims.cross:
        return None
    return Mask(global_tokens=(torch.arange(x.shape[1]) == 0).expand(x.shape[0], -1))


def _jacobian(subject: Subject, length: int, salt: int) -> torch.Tensor:
    """Norm of ∂(c·y_i)/∂x_j for random c, float64 (length, length); row b of the batch asks for token b."""
    mixer = subject.mixer()
    x = subject.inputs(length, batch=1, salt=salt).x.repeat(length, 1, 1)
    context = None
    source = x
    if subject.dims.cross:
        other = subject.inputs(length, batch=1, salt=salt + 2).x.repeat(length, 1, 1)
        context = source = other
    source.requires_grad_()
    y = mixer(x, context, mask=_first_is_global(subject, x)).y
    direction = subject.inputs(1, batch=1, salt=salt + 4).x[0, 0]
    (gradient,) = torch.autograd.grad((y.diagonal(dim1=0, dim2=1).T @ direction).sum(), source)
    return gradient.norm(dim=2)
