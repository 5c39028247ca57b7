"""N-gram attention sees N - 1 keys, itself included, in one call as in any pieces of a stream."""

from __future__ import annotations

import pytest
import torch
from comparison import (
    assert_same_values_and_gradients,
    attend_by_loops,
    disturbed,
    finish,
    is_valid,
    masks,
    qkv,
    same_document,
)
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from subquad import Mask
from subquad.build import build_mixer, cost
from subquad.layers.heads import HeadMixer
from subquad.mechanisms.ngram import NgramState


def ngram(n: int) -> HeadMixer:
    mixer = build_mixer("ngram", embed_dim=4, num_heads=2, causal=True, n=n)
    assert isinstance(mixer, HeadMixer)
    return disturbed(mixer)


def definition(mixer: HeadMixer, x: Tensor, mask: Mask | None, n: int) -> Tensor:
    valid = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None or mask.valid is None else mask.valid
    ranks = [[sum(row[:i]) for i in range(len(row))] for row in valid.tolist()]

    def sees(b: int, i: int, j: int) -> bool:
        near = 0 <= ranks[b][i] - ranks[b][j] <= n - 2
        return near and is_valid(mask, b, j) and same_document(mask, b, i, j)

    return finish(mixer, attend_by_loops(*qkv(mixer, x), sees), mask)


@given(length=st.sampled_from([1, 2, 7, 31, 32, 33, 50]), n=st.sampled_from([1, 2, 3, 8, 101]), data=st.data())
def test_it_equals_the_definition(length: int, n: int, data: st.DataObject) -> None:
    mixer, mask = ngram(n), data.draw(masks(2, length))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask, n), [x])


@given(
    n=st.sampled_from([1, 2, 3, 5, 9]),
    pieces=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    data=st.data(),
)
@example(n=5, pieces=[1] * 12, data=None)
def test_a_stream_equals_the_definition_over_the_whole(n: int, pieces: list[int], data: st.DataObject | None) -> None:
    length = sum(pieces)
    mixer, mask = ngram(n), None if data is None else data.draw(masks(2, length))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    facts = (None, None) if mask is None else (mask.valid, mask.segments)

    def streamed() -> Tensor:
        state, outputs, start = mixer.init_state(2), [], 0
        for part in pieces:
            cut = slice(start, start + part)
            part_mask = Mask(*(None if fact is None else fact[:, cut] for fact in facts))
            y, state, _ = mixer(x[:, cut], mask=part_mask, state=state)
            outputs.append(y)
            start += part
        return torch.cat(outputs, dim=1)

    assert_same_values_and_gradients(mixer, streamed, lambda: definition(mixer, x, mask, n), [x])


@pytest.mark.parametrize(("n", "seen"), [(1, []), (2, [10]), (3, [9, 10]), (6, [6, 7, 8, 9, 10])])
def test_a_token_sees_one_key_fewer_than_n(n: int, seen: list[int]) -> None:
    mixer = ngram(n)
    x = torch.randn(1, 20, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x).y[0, 10].sum(), x, materialize_grads=True)
    assert gradient[0].abs().amax(dim=1).nonzero()[:, 0].tolist() == seen


def test_a_one_gram_gives_the_bias_of_the_output_projection() -> None:
    mixer = ngram(1)
    y = mixer(torch.randn(1, 5, 4, dtype=torch.float64)).y
    assert torch.equal(y, mixer.project_out.bias.expand_as(y))


def test_an_n_beyond_the_sequence_is_dense_causal_attention() -> None:
    mixer, dense = ngram(99), build_mixer("full", embed_dim=4, num_heads=2, causal=True).double()
    dense.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 40, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x).y, dense(x).y, rtol=1e-10, atol=1e-10)


def test_the_state_holds_the_newest_tokens_in_its_last_columns_and_never_grows() -> None:
    mixer = ngram(5)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    valid = torch.tensor([[True] * 5, [False, True, False, False, True]])
    empty = mixer.init_state(2)
    state = mixer(x, mask=Mask(valid), state=empty).state
    assert isinstance(state, NgramState)
    assert state.length.tolist() == [5, 2]
    assert state.nbytes == empty.nbytes
    k, v = (tensor.transpose(1, 2) for tensor in qkv(mixer, x)[1:])
    for stored, computed in ((state.keys, k), (state.values, v)):
        torch.testing.assert_close(stored[0], computed[0, :, 2:])
        torch.testing.assert_close(stored[1, :, 1:], computed[1][:, [1, 4]])
        assert not stored[1, :, 0].any()


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_that_looks_nowhere_back_stores_no_token(n: int) -> None:
    state = ngram(n).init_state(3)
    assert state.nbytes == state.length.nbytes


def test_the_price_counts_n_minus_one_keys_of_every_token() -> None:
    sizes = {"embed_dim": 4, "num_heads": 2, "causal": True}
    projections = cost("ngram", length=100, n=1, **sizes).flops
    pairs = [(cost("ngram", length=100, n=n, **sizes).flops - projections) // (4 * 4) for n in (2, 3, 8)]
    assert pairs == [100, 99 + 100, 7 * 100 - (1 + 2 + 3 + 4 + 5 + 6)]


def test_a_bidirectional_form_is_refused() -> None:
    with pytest.raises(ValueError, match="ngram: causal=False is not supported"):
        build_mixer("ngram", embed_dim=4, num_heads=2)


def test_an_n_below_one_is_refused() -> None:
    with pytest.raises(
        ValueError, match="ngram: n must be at least 1, a token sees n - 1 keys, itself included; got 0"
    ):
        build_mixer("ngram", embed_dim=4, num_heads=2, causal=True, n=0)
