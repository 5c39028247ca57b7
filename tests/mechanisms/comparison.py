"""Holding a mechanism against its definition, restated densely: values and all gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from subquad import Mask
from subquad.interface import TokenMixer
from subquad.layers.heads import HeadMixer

Sees = Callable[[int, int, int], bool]
"""Whether, in example b, token i sees token j."""


def disturbed(mixer: HeadMixer) -> HeadMixer:
    """The mixer in float64 with random biases, which are 0 when a model is new."""
    mixer = mixer.double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return mixer


def assert_same_values_and_gradients(
    module: nn.Module, fast: Callable[[], Tensor], definition: Callable[[], Tensor], inputs: list[Tensor]
) -> None:
    """Compare results and the gradients of a random combination of them, of the inputs and of every parameter."""
    leaves = [*inputs, *module.parameters()]
    y, expected = fast(), definition()
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(y)
    found = torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
    for gradient, expected_gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


def streamed(mixer: TokenMixer, x: Tensor, mask: Mask | None, pieces: list[int]) -> Tensor:
    """The result of one call for each piece of x (B, L, D), each from the state that the last one left."""
    state, outputs = mixer.init_state(len(x)), []
    facts = (None, None) if mask is None else (mask.valid, mask.segments)
    for cut in (slice(end - size, end) for size, end in zip(pieces, accumulate(pieces), strict=True)):
        part = Mask(*(None if fact is None else fact[:, cut] for fact in facts))
        y, state, _ = mixer(x[:, cut], mask=part, state=state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def split_heads(mixer: HeadMixer, projection: nn.Module, x: Tensor) -> Tensor:
    """(B, L, D) -> (B, L, H, E)."""
    return projection(x).unflatten(-1, (mixer.dims.num_heads, mixer.dims.head_dim))


def qkv(mixer: HeadMixer, x: Tensor, source: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of x, keys and values of the source (x by default), each (B, L, H, E)."""
    source = x if source is None else source
    return (
        split_heads(mixer, mixer.project_query, x),
        split_heads(mixer, mixer.project_key, source),
        split_heads(mixer, mixer.project_value, source),
    )


def finish(mixer: HeadMixer, out: Tensor, mask: Mask | None) -> Tensor:
    """Heads (B, L, H, E) merged and projected, 0 at invalid positions."""
    y = mixer.project_out(out.flatten(2))
    return y if mask is None or mask.valid is None else torch.where(mask.valid[..., None], y, 0.0)


def softmax_over(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """What one query q (H, E) reads from keys k and values v (N, H, E); 0 where N = 0. The bias (N,) is for scores."""
    scores = torch.einsum("he,nhe->hn", q, k) / q.shape[-1] ** 0.5
    scores = scores if bias is None else scores + bias
    return torch.einsum("hn,nhe->he", scores.softmax(dim=-1), v)


def attend_by_loops(q: Tensor, k: Tensor, v: Tensor, sees: Sees) -> Tensor:
    """Softmax attention, one query after the other: (B, L, H, E)."""
    out = []
    for b in range(q.shape[0]):
        rows = []
        for i in range(q.shape[1]):
            keys = [j for j in range(k.shape[1]) if sees(b, i, j)]
            rows.append(softmax_over(q[b, i], k[b, keys], v[b, keys]))
        out.append(torch.stack(rows))
    return torch.stack(out)


def is_valid(mask: Mask | None, b: int, j: int) -> bool:
    return mask is None or mask.valid is None or bool(mask.valid[b, j])


def same_document(mask: Mask | None, b: int, i: int, j: int) -> bool:
    return mask is None or mask.segments is None or bool(mask.segments[b, i] == mask.segments[b, j])


@st.composite
def masks(draw: st.DrawFn, batch: int, length: int, *, segments: bool = True) -> Mask | None:
    """No mask, or any combination of padding, in any places, and documents."""
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    valid = {
        "none": None,
        "right": torch.arange(length) < torch.randint(0, length + 1, (batch, 1), generator=generator),
        "anywhere": torch.rand(batch, length, generator=generator) < 0.6,
        "everywhere": torch.zeros(batch, length, dtype=torch.bool),
    }[draw(st.sampled_from(["none", "right", "anywhere", "everywhere"]))]
    documents = None
    if segments and draw(st.booleans()):
        documents = (torch.rand(batch, length, generator=generator) < 0.3).long().cumsum(dim=1) - 1
    return None if valid is None and documents is None else Mask(valid, documents)


def assert_cross_equals_definition(
    mixer: HeadMixer,
    definition: Callable[..., Tensor],
    length: int,
    source_length: int,
    data: st.DataObject,
) -> None:
    """Compare cross-attention, `definition(mixer, x, source, mask, source_mask)`, under random masks of both sides."""
    mask, source_mask = (data.draw(masks(2, size, segments=False)) for size in (length, source_length))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    source = torch.randn(2, source_length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(
        mixer,
        lambda: mixer(x, source, mask=mask, context_mask=source_mask).y,
        lambda: definition(mixer, x, source, mask, source_mask),
        [x, source],
    )
