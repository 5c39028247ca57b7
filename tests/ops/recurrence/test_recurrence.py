"""Recurrences in chunks equal their definition token by token, and known forms of them in closed form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from subquad.ops.recurrence import chunks
from subquad.ops.recurrence.linear import Recurred, recurrence, recurrence_by_tokens

LENGTHS = st.sampled_from([1, 2, 3, 5, 13, 33, 64, 70])
CHUNKS = st.sampled_from([1, 2, 4, 17, 64])
DECAYS = st.sampled_from([0.0, 0.1, 3.0, 80.0])


def heads(length: int, *, width: int = 3, value_width: int = 4, batch: int = 2) -> list[Tensor]:
    """Queries, unit keys and values, (B, 2, L, ·), float64."""
    q, k, v = (torch.randn(batch, 2, length, size, dtype=torch.float64) for size in (width, width, value_width))
    return [tensor.requires_grad_() for tensor in (q, F.normalize(k, dim=-1), v)]


def log_decays(length: int, width: int, strength: float) -> Tensor:
    return (-strength * torch.rand(2, 2, length, width, dtype=torch.float64)).requires_grad_()


def assert_same(fast: Recurred, slow: Recurred, leaves: list[Tensor]) -> None:
    weights = [torch.randn_like(part) for part in fast]
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    totals = ((result.out * weights[0]).sum() + (result.after * weights[1]).sum() for result in (fast, slow))
    pairs = (torch.autograd.grad(total, leaves) for total in totals)
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@pytest.mark.parametrize("decay_width", [None, 1, 3])
@given(length=LENGTHS, chunk=CHUNKS, strength=DECAYS, padded=st.booleans(), fresh=st.booleans())
@example(length=70, chunk=64, strength=80.0, padded=True, fresh=False)
def test_chunks_equal_the_definition(
    delta: bool, decay_width: int | None, length: int, chunk: int, strength: float, padded: bool, fresh: bool
) -> None:
    q, k, v = heads(length)
    log_decay = None if decay_width is None else log_decays(length, decay_width, strength)
    beta = (2 * torch.rand(2, 2, length, dtype=torch.float64)).requires_grad_() if delta else None
    before = None if fresh else torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    valid = torch.rand(2, length) < 0.6 if padded else None
    fast = recurrence(q, k, v, log_decay, beta=beta, before=before, valid=valid, chunk=chunk)
    slow = recurrence_by_tokens(q, k, v, log_decay, beta=beta, before=before, valid=valid)
    assert_same(fast, slow, [tensor for tensor in (q, k, v, log_decay, beta, before) if tensor is not None])


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
def test_segments_equal_the_definition(delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence longer than what is worked on at once."""
    monkeypatch.setattr(chunks, "NUMBERS", 200)
    q, k, v = heads(45)
    log_decay, beta = log_decays(45, 3, 1.0), torch.rand(2, 2, 45, dtype=torch.float64) if delta else None
    assert len(chunks.segments(3, v, 4)) > 3
    fast = recurrence(q, k, v, log_decay, beta=beta, chunk=4)
    assert_same(fast, recurrence_by_tokens(q, k, v, log_decay, beta=beta), [q, k, v, log_decay])


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@given(length=st.integers(2, 30), data=st.data())
def test_it_goes_on_from_the_matrix_of_earlier_tokens(delta: bool, length: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, length - 1))
    tokens = [*heads(length), log_decays(length, 1, 0.5)]
    beta = torch.rand(2, 2, length, dtype=torch.float64) if delta else None
    whole = recurrence(*tokens, beta=beta)
    pieces, matrix = [], None
    for part in (slice(0, cut), slice(cut, length)):
        piece_beta = None if beta is None else beta[:, :, part]
        out, matrix = recurrence(*(tensor[:, :, part] for tensor in tokens), beta=piece_beta, before=matrix, chunk=8)
        pieces.append(out)
    joined = Recurred(torch.cat(pieces, dim=2), matrix)
    assert_same(joined, whole, tokens)


@given(length=LENGTHS, chunk=CHUNKS)
def test_a_constant_decay_is_a_matrix_of_its_powers(length: int, chunk: int) -> None:
    """Retention's parallel form, quadratic in the length."""
    q, k, v = heads(length)
    gamma = torch.tensor([0.9, 0.3], dtype=torch.float64)[:, None, None]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    decay = (gamma ** distance.clamp_min(0)).tril()
    expected = ((q @ k.mT) * decay) @ v
    out = recurrence(q, k, v, gamma.log().expand(2, 2, length, 1), chunk=chunk).out
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_orthonormal_keys_with_beta_one_are_an_exact_memory() -> None:
    """Each value is found again with its key, and writing a key again replaces its value."""
    keys = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    k = torch.cat((keys, keys[:2]))[None, None]
    v = torch.randn(1, 1, 8, 5, dtype=torch.float64)
    beta, none = torch.ones(1, 1, 8, dtype=torch.float64), torch.zeros(1, 1, 8, 1, dtype=torch.float64)
    matrix = recurrence(k, k, v, none, beta=beta).after[0, 0]
    torch.testing.assert_close(keys @ matrix, torch.cat((v[0, 0, 6:], v[0, 0, 2:6])), rtol=1e-10, atol=1e-10)


@given(length=st.sampled_from([1, 5, 64, 130]), seed=st.integers(0, 1000))
def test_the_gated_delta_rule_equals_that_of_qwen3_next(length: int, seed: int) -> None:
    """Hugging Face's has tokens before heads, scales queries, and computes in float32."""
    torch.manual_seed(seed)
    q, k, v = heads(length, width=8, value_width=8)
    log_decay, beta = log_decays(length, 1, 1.0), torch.rand(2, 2, length, dtype=torch.float64)
    before = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    others = (tensor.detach().float().transpose(1, 2) for tensor in (q, k, v, log_decay[..., 0], beta))
    expected, after = qwen3_next.torch_chunk_gated_delta_rule(
        *others, initial_state=before.float(), output_final_state=True
    )
    assert after is not None
    ours = recurrence(q * 8**-0.5, k, v, log_decay, beta=beta, before=before)
    torch.testing.assert_close(ours.out.float().transpose(1, 2), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.after.float(), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
@pytest.mark.parametrize("decay_width", [1, 3])
def test_no_decay_overflows_in_float32(delta: bool, decay_width: int) -> None:
    """Gates of any strength, where exp(-G) alone is infinite after two tokens."""
    q, k, v = (tensor.detach().float().requires_grad_() for tensor in heads(70))
    strengths = 10.0 ** torch.randint(-3, 4, (2, 2, 70, decay_width))
    log_decay = (-strengths * torch.rand_like(strengths)).requires_grad_()
    beta = torch.rand(2, 2, 70) if delta else None
    leaves = [q, k, v, log_decay]
    fast = recurrence(q, k, v, log_decay, beta=beta)
    exact = recurrence_by_tokens(*(leaf.double() for leaf in leaves), beta=None if beta is None else beta.double())
    torch.testing.assert_close(fast.out.double(), exact.out, rtol=5e-5, atol=5e-5)
    grads, wanted = (torch.autograd.grad(result.out.sum(), leaves) for result in (fast, exact))
    for grad, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=5e-4)


def test_equal_keys_do_not_spoil_the_delta_rule() -> None:
    """The triangular system of a chunk of equal keys and β near 2 is the worst there is."""
    k = torch.ones(1, 1, 128, 4) / 2
    v, none = torch.randn(1, 1, 128, 4), torch.zeros(1, 1, 128, 1)
    beta = torch.full((1, 1, 128), 1.99)
    exact = recurrence_by_tokens(k.double(), k.double(), v.double(), none.double(), beta=beta.double())
    torch.testing.assert_close(recurrence(k, k, v, none, beta=beta).out.double(), exact.out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
def test_narrow_inputs_are_summed_in_float32(delta: bool) -> None:
    ones = torch.ones(1, 1, 3000, 2, dtype=torch.bfloat16)
    none, beta = torch.zeros(1, 1, 3000, 1), torch.ones(1, 1, 3000) if delta else None
    out, after = recurrence(ones, ones / 2**0.5, ones, none, beta=beta)
    assert (out.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    assert float(out[0, 0, -1, 0]) == pytest.approx(2**0.5 if delta else 3000 * 2**0.5, rel=0.01)


@pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
def test_autocast_narrows_nothing(delta: bool) -> None:
    q, k, v = (tensor.detach().float().requires_grad_() for tensor in heads(70))
    log_decay, beta = log_decays(70, 3, 0.1).detach().float(), torch.rand(2, 2, 70) if delta else None
    expected = recurrence(q, k, v, log_decay, beta=beta).out
    wanted = torch.autograd.grad(expected.sum(), (q, k, v))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = recurrence(q, k, v, log_decay, beta=beta).out
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert torch.equal(out, expected)
    assert all(map(torch.equal, grads, wanted))


TOKENS = (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (
            [(2, 3, 4), TOKENS, TOKENS, TOKENS],
            {},
            r"expected q, k \(B, H, L, E\) and v \(B, H, L, Ev\), got \(2, 3, 4\)",
        ),
        ([TOKENS, (2, 3, 5, 5), TOKENS, TOKENS], {}, r"expected q, k \(B, H, L, E\)"),
        ([(2, 3, 0, 5)] * 4, {}, "there are no tokens; pass at least one"),
        (
            [TOKENS, TOKENS, TOKENS, (2, 3, 4, 2)],
            {},
            r"log_decay must have shape \(2, 3, 4, 1 or 5\), got \(2, 3, 4, 2\)",
        ),
        ([TOKENS] * 4, {"beta": torch.ones(2, 3, 4, 1)}, r"beta must have shape \(2, 3, 4\), got \(2, 3, 4, 1\)"),
        ([TOKENS] * 4, {"before": torch.ones(2, 3, 5, 4)}, r"before must have shape \(2, 3, 5, 5\)"),
        ([TOKENS] * 4, {"valid": torch.ones(2, 5, dtype=torch.bool)}, r"valid must have shape \(2, 4\), got \(2, 5\)"),
        ([TOKENS] * 4, {"chunk": 0}, "chunk must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: list[tuple[int, ...]], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recurrence(*(torch.zeros(shape) for shape in shapes), **options)  # pyright: ignore[reportArgumentType] - cases
