"""LSH attention in sorted tiles equals its definition by pairs, and the lists are those of a loop over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import subquad
from subquad.ops.lsh.attention import continue_in_buckets, lsh_attention, lsh_attention_by_pairs
from subquad.ops.lsh.hash import (
    derived_factors,
    hash_into_buckets,
    num_buckets,
    random_rotations,
    rotation_columns,
)
from subquad.ops.lsh.lists import ListRule, listed_counts
from subquad.ops.lsh.tiles import attend_in_buckets, unit_keys
from subquad.ops.softmax import softmax_attention_with_lse

LENGTHS = st.sampled_from([1, 2, 3, 5, 8, 12, 17, 33])
CHUNKS = st.sampled_from([0, 1, 2, 3, 100])
"""Seen beside the own one."""
PADDING = st.sampled_from(["none", "right", "anywhere", "everywhere"])


@st.composite
def rules(draw: st.DrawFn) -> ListRule:
    """Every combination of options that is allowed."""
    chunk, dedup, before = draw(st.sampled_from([1, 2, 3, 4, 8, 40])), draw(st.booleans()), draw(CHUNKS)
    if draw(st.booleans()):
        causal = draw(st.booleans())
        after = 0 if causal else draw(CHUNKS)
        return ListRule(chunk, True, causal, dedup=dedup, chunks_before=before, chunks_after=after)
    same_bucket_only = draw(st.booleans())
    wrap = not same_bucket_only and draw(st.booleans())
    return ListRule(chunk, False, False, same_bucket_only, dedup, wrap, before, draw(CHUNKS))


def options_of(rule: ListRule) -> dict[str, Any]:
    options = rule._asdict()
    return {"chunks": "bucket" if options.pop("per_bucket") else "global", **options}


def padding(kind: str, length: int) -> Tensor | None:
    return {
        "none": None,
        "right": torch.arange(length) < torch.randint(0, length + 1, (2, 1)),
        "anywhere": torch.rand(2, length) < 0.6,
        "everywhere": torch.zeros(2, length, dtype=torch.bool),
    }[kind]


def vectors(length: int, *, batch: int = 2, width: int = 4) -> tuple[Tensor, Tensor]:
    """A qk and v of two heads."""
    shape = (batch, 2, length, width)
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))  # pyright: ignore[reportReturnType] - two


def assert_equal_with_gradients(out: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(out)
    found, wanted = (
        torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
        for y in (out, expected)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@given(
    length=LENGTHS,
    rule=rules(),
    rounds=st.integers(1, 3),
    buckets=st.sampled_from([1, 2, 8, (2, 4)]),
    kind=PADDING,
)
@example(length=12, rule=ListRule(4), rounds=2, buckets=8, kind="none")
@example(length=14, rule=ListRule(4, wrap=True, dedup=True), rounds=3, buckets=8, kind="right")
@example(length=33, rule=ListRule(4, wrap=True, chunks_before=2, chunks_after=3), rounds=3, buckets=8, kind="right")
@example(length=33, rule=ListRule(2, chunks_before=3, chunks_after=2), rounds=2, buckets=8, kind="none")
@example(length=8, rule=ListRule(4, wrap=True, chunks_after=1), rounds=1, buckets=8, kind="none")
@example(length=33, rule=ListRule(2, True, chunks_before=3, chunks_after=2), rounds=2, buckets=8, kind="none")
@example(length=33, rule=ListRule(2, True, True, chunks_before=2), rounds=2, buckets=8, kind="right")
def test_tiles_equal_the_definition(
    length: int, rule: ListRule, rounds: int, buckets: int | tuple[int, ...], kind: str
) -> None:
    (qk, v), valid = vectors(length), padding(kind, length)
    options: dict[str, Any] = {"rounds": rounds, "buckets": buckets, "seed": length, **options_of(rule)}
    out = lsh_attention(qk, v, valid=valid, **options)
    assert_equal_with_gradients(out, lsh_attention_by_pairs(qk, v, valid=valid, **options), (qk, v))


def test_long_sequences_are_cut_into_calls_without_a_trace() -> None:
    (qk, v), rotations = vectors(600, batch=1, width=64), random_rotations(2, 2, 64, 4, generator=torch.Generator())
    buckets = hash_into_buckets(qk, rotations, (8,))
    rules = (
        ListRule(2),
        ListRule(2, chunks_before=2, chunks_after=1),
        ListRule(2, same_bucket_only=True, dedup=True),
        ListRule(3, per_bucket=True),
    )
    for rule in rules:
        counts = listed_counts(buckets, rule).double()
        scores = qk @ unit_keys(qk).mT + counts.log()
        assert_equal_with_gradients(attend_in_buckets(qk, v, buckets, rule), scores.softmax(dim=-1) @ v, (qk, v))


@pytest.mark.parametrize("heads_together", [1, 2, 7])
@pytest.mark.parametrize(
    "rule",
    [
        ListRule(4),
        ListRule(2, chunks_before=2, chunks_after=1),
        ListRule(4, wrap=True, dedup=True),
        ListRule(2, wrap=True, dedup=True, chunks_before=1, chunks_after=3),
        ListRule(2, wrap=True, chunks_before=2, chunks_after=5),
        ListRule(3, True, True),
    ],
    ids=str,
)
def test_heads_and_examples_are_cut_into_groups_without_a_trace(heads_together: int, rule: ListRule) -> None:
    qk, v = (torch.randn(5, 3, 11, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    valid = torch.arange(11) < torch.tensor([[11], [0], [4], [7], [1]])
    options: dict[str, Any] = {"rounds": 2, "buckets": 4, "seed": 0, "valid": valid, **options_of(rule)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subquad.ops.lsh.rounds.GROUP_BYTES", heads_together * 11 * 4 * 8)
        out = lsh_attention(qk, v, **options)
        assert_equal_with_gradients(out, lsh_attention_by_pairs(qk, v, **options), (qk, v))


def lists_by_loops(buckets: list[list[int]], rule: ListRule, valid: list[bool]) -> list[list[list[int]]]:
    """For each token the list of each round, made as a person would make it; buckets by round."""
    size, (to_left, to_right), orders = rule.chunk, rule.sides, []
    for hashed in buckets:
        order = sorted((i for i in range(len(hashed)) if valid[i]), key=lambda i: (hashed[i], i))
        groups = [[i for i in order if hashed[i] == b] for b in sorted(set(hashed))] if rule.per_bucket else [order]
        orders.append([[group[start : start + size] for start in range(0, len(group), size)] for group in groups])
    lists: list[list[list[int]]] = [[] for _ in valid]
    ring = [chunk for groups in orders for chunks in groups for chunk in chunks]
    start = 0
    for groups, hashed in zip(orders, buckets, strict=True):
        for chunks in groups:
            for place, chunk in enumerate(chunks):
                window = range(place - to_left, place + to_right + 1)
                if rule.wrap:
                    listed = [ring[n] for n in {(start + n) % len(ring) for n in window}]
                else:
                    listed = [chunks[n] for n in window if 0 <= n < len(chunks)]
                for i in chunk:
                    seen = [j for other in listed for j in other if j != i and not (rule.causal and j > i)]
                    lists[i].append([j for j in seen if not rule.same_bucket_only or hashed[j] == hashed[i]])
        start += sum(map(len, groups))
    return lists


@given(
    rule=rules(),
    buckets=st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=1, max_size=3)
    ),
    data=st.data(),
)
def test_the_definition_makes_the_lists_of_a_loop(
    rule: ListRule, buckets: list[list[int]], data: st.DataObject
) -> None:
    length = len(buckets[0])
    valid = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    lists = lists_by_loops(buckets, rule, valid)
    counts = listed_counts(torch.tensor(buckets)[None, None], rule, torch.tensor(valid)[None])[0, 0]
    for i in range(length):
        everything = [j for seen in lists[i] for j in seen]
        if valid[i] and not everything:
            everything = [i]
        expected = [everything.count(j) if valid[i] else 0 for j in range(length)]
        assert counts[i].tolist() == ([min(1, count) for count in expected] if rule.dedup else expected)


@pytest.mark.parametrize("sides", [(1, 0), (2, 3), (0, 20)])
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_pairs_of_a_ring_are_counted_but_for_tokens_that_meet_themselves(
    sides: tuple[int, int], rounds: int
) -> None:
    rule, buckets = ListRule(4, wrap=True, chunks_before=sides[0], chunks_after=sides[1]), torch.rand(1, 1, rounds, 66)
    listed = int(listed_counts(buckets.argsort(dim=-1), rule).sum())
    assert listed <= rounds * rule.listed_pairs(rounds, 66) <= (1.02 if rounds > 1 else 1) * listed


@pytest.mark.parametrize("chunks", ["global", "bucket"])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("dedup", [False, True])
def test_one_bucket_in_one_chunk_is_attention_to_everything_else(chunks: Any, rounds: int, dedup: bool) -> None:
    qk, v = vectors(11)
    out = lsh_attention(qk, v, rounds=rounds, chunk=11, buckets=1, seed=0, chunks=chunks, dedup=dedup)
    others = ~torch.eye(11, dtype=torch.bool)
    keys = qk / (qk.square().sum(dim=-1, keepdim=True) + 4e-6).sqrt()
    assert_equal_with_gradients(out, softmax_attention_with_lse(qk, keys, v, others, 1.0)[0], (qk, v))


def test_a_token_alone_gives_its_own_value_and_takes_its_gradient() -> None:
    qk, v = vectors(1)
    out = lsh_attention(qk, v, rounds=2, chunk=4, buckets=8, seed=0)
    of_qk, of_v = torch.autograd.grad(out.sum(), (qk, v))
    assert torch.equal(out, v)
    assert torch.equal(of_v, torch.ones_like(v))
    assert not of_qk.any()


@torch.no_grad()
def distance_to_full(rounds: int) -> float:
    """Relative distance to attention to everything else, of vectors that are similar to a few others."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(16, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(1, 2, 128, 8, generator=generator, dtype=torch.float64)
    qk = 3 * (centres.repeat(8, 1) + 0.3 * noise)
    v = torch.randn(1, 2, 128, 8, generator=generator, dtype=torch.float64)
    full = softmax_attention_with_lse(qk, unit_keys(qk), v, ~torch.eye(128, dtype=torch.bool), 1.0)[0]
    out = lsh_attention(qk, v, rounds=rounds, chunk=16, buckets=16, seed=3, same_bucket_only=True, dedup=True)
    return float((out - full).norm() / full.norm())


def test_more_rounds_come_closer_to_attention_to_everything() -> None:
    distances = [distance_to_full(rounds) for rounds in (1, 2, 4, 8, 16, 64)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.02 < distances[0] / 5


def recall(rounds: int) -> float:
    """The share of each token's most similar other token that is on its lists."""
    x = torch.randn(1, 4, 256, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat((x, x + 0.4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))), dim=2)
    rotations = random_rotations(rounds, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    counts = listed_counts(hash_into_buckets(x, rotations, (32,)), ListRule(32, same_bucket_only=True))
    similarity = (unit_keys(x) @ unit_keys(x).mT) - 2 * torch.eye(512)
    return float((counts.gather(-1, similarity.argmax(dim=-1, keepdim=True)) > 0).double().mean())


def test_the_most_similar_token_is_found_more_often_with_more_rounds() -> None:
    found = [recall(rounds) for rounds in (1, 2, 4, 8)]
    assert found == sorted(found)
    assert found[0] > 0.3
    assert found[-1] > 0.95


@given(
    length=LENGTHS,
    cut=st.integers(1, 32),
    chunk=st.sampled_from([1, 2, 4]),
    before=CHUNKS,
    dedup=st.booleans(),
    rounds=st.integers(1, 3),
)
def test_chunks_inside_buckets_depend_on_no_later_token(
    length: int, cut: int, chunk: int, before: int, dedup: bool, rounds: int
) -> None:
    (qk, v), cut = vectors(length), min(cut, length)
    options: dict[str, Any] = {"chunks": "bucket", "causal": True, "dedup": dedup, "chunks_before": before}
    options |= {"rounds": rounds, "chunk": chunk, "buckets": 4, "seed": 0}
    whole = lsh_attention(qk, v, **options)
    prefix = lsh_attention(qk[:, :, :cut], v[:, :, :cut], **options)
    torch.testing.assert_close(prefix, whole[:, :, :cut], rtol=1e-12, atol=1e-12)


def test_in_one_order_of_all_tokens_a_later_one_is_felt() -> None:
    """Why chunks="global" has no causal form: even under a causal mask the borders of chunks would move."""
    buckets, rule = torch.tensor([[[[1, 1, 1, 1, 0]]]]), ListRule(2)
    shorter, longer = (listed_counts(buckets[..., :length], rule)[0, 0, 3, :3].tolist() for length in (4, 5))
    assert (shorter, longer) == ([1, 1, 1], [0, 1, 1])


@given(
    length=st.integers(1, 20),
    stored=st.integers(0, 12),
    chunk=st.sampled_from([1, 2, 4]),
    before=CHUNKS,
    dedup=st.booleans(),
    height=st.sampled_from([1, 3, 1000]),
)
def test_a_stream_goes_on_from_stored_tokens(
    length: int, stored: int, chunk: int, before: int, dedup: bool, height: int
) -> None:
    (qk, v), rule = vectors(stored + length), ListRule(chunk, True, True, dedup=dedup, chunks_before=before)
    buckets = torch.randint(0, 3, (2, 2, 2, stored + length))
    columns = (stored + torch.arange(length)).expand(2, length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subquad.ops.lsh.attention.LARGEST_SLICE", 4 * (stored + length) * height)
        out = continue_in_buckets(qk[:, :, stored:], qk, v, buckets[..., stored:], buckets, columns, rule)
        whole = attend_in_buckets(qk, v, buckets, rule)
        assert_equal_with_gradients(out, whole[:, :, stored:], (qk, v))


def test_nothing_that_an_invalid_token_holds_is_felt() -> None:
    (qk, v), valid = vectors(19), torch.rand(2, 19) < 0.6
    options: dict[str, Any] = {"rounds": 2, "chunk": 4, "buckets": 4, "seed": 0, "valid": valid}
    out = lsh_attention(qk, v, **options)
    of_qk, of_v = torch.autograd.grad(out.sum(), (qk, v))
    spoiled = (x.detach().masked_fill(~valid[:, None, :, None], float("nan")).requires_grad_() for x in (qk, v))
    qk, v = spoiled
    again = lsh_attention(qk, v, **options)
    assert torch.equal(again, out)
    assert not out[~valid[:, None].expand(2, 2, 19)].any()
    for gradient, expected in zip(torch.autograd.grad(again.sum(), (qk, v)), (of_qk, of_v), strict=True):
        assert torch.equal(gradient, expected)


def test_buckets_are_the_nearest_of_the_rotated_directions() -> None:
    x = torch.randn(2, 3, 40, 8, dtype=torch.float64, requires_grad=True)
    rotations = random_rotations(3, 3, 8, 7, generator=torch.Generator().manual_seed(0))
    found = hash_into_buckets(x, rotations, (6, 8))
    assert not found.requires_grad
    rotated = torch.einsum("bhle,rhec->bhrlc", x, rotations)
    low, high = (torch.cat((part, -part), dim=-1).argmax(dim=-1) for part in rotated.split((3, 4), dim=-1))
    assert torch.equal(found, low + 6 * high)
    assert torch.equal(hash_into_buckets(7 * x, rotations, (6, 8)), found)
    assert torch.equal(hash_into_buckets(-x, rotations, (6,)), (found % 6 + 3) % 6)
    assert not hash_into_buckets(x, rotations, (1,)).any()


def test_further_rounds_leave_the_first_ones_as_they_are() -> None:
    few, many = (random_rotations(n, 2, 4, 3, generator=torch.Generator().manual_seed(5)) for n in (2, 6))
    assert torch.equal(few, many[:2])


@given(length=st.integers(0, 2**24), chunk=st.sampled_from([1, 7, 64]))
def test_a_derived_count_gives_half_a_chunk_to_each_bucket(length: int, chunk: int) -> None:
    factors = derived_factors(length, chunk)
    count = num_buckets(factors)
    assert all(2 <= factor <= 128 and factor.bit_count() == 1 for factor in factors)
    assert rotation_columns(factors) <= 128
    if 2 * chunk <= length <= 2**13 * chunk:
        assert length / chunk < count <= 2 * length / chunk


def test_narrow_vectors_are_attended_to_in_float32() -> None:
    qk, v = (x.detach().float() for x in vectors(40))
    options: dict[str, Any] = {"rounds": 2, "chunk": 8, "buckets": 4, "seed": 0}
    narrow = lsh_attention(qk.bfloat16(), v.bfloat16(), **options)
    wide = lsh_attention(qk.bfloat16().float(), v.bfloat16().float(), **options)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, wide.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lsh_attention(qk, v, **options), lsh_attention(qk, v, **options).float())


@pytest.mark.parametrize("rule", [ListRule(4), ListRule(4, same_bucket_only=True, dedup=True), ListRule(4, True)])
def test_vectors_values_result_and_one_number_a_row_are_kept(rule: ListRule) -> None:
    (qk, v), kept = vectors(64), {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = lsh_attention(qk, v, rounds=8, buckets=8, seed=0, **options_of(rule))
    assert sum(kept.values()) == qk.nbytes + v.nbytes + out.nbytes + v.nbytes // 4


def test_it_is_public() -> None:
    assert subquad.ops.lsh_attention is lsh_attention


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "lsh_attention: rounds counts the hashes and must be at least 1, got 0"),
        ({"chunk": 0}, "lsh_attention: chunk counts the tokens of a chunk and must be at least 1, got 0"),
        ({"buckets": 3}, "lsh_attention: buckets must be 1 or even, .* got 3"),
        ({"buckets": (4, 5)}, r"lsh_attention: buckets must be 1 or even, .* got \(4, 5\)"),
        ({"chunks": "all"}, "lsh_attention: chunks must be 'global' or 'bucket', got 'all'"),
        ({"causal": True}, "causal=True is not possible with chunks='global': .* use chunks='bucket'"),
        ({"chunks_before": -1}, "lsh_attention: chunks_before counts .* must not be negative, got -1"),
        ({"chunks_after": -2}, "lsh_attention: chunks_after counts .* must not be negative, got -2"),
        (
            {"chunks": "bucket", "causal": True, "chunks_after": 1},
            "causal=True is not possible with chunks_after=1: .* later tokens alone; use chunks_after=0",
        ),
        ({"wrap": True, "same_bucket_only": True}, "wrap=True .* excludes same_bucket_only=True"),
        ({"wrap": True, "chunks": "bucket"}, "wrap=True .* excludes chunks='bucket'"),
        ({"valid": torch.ones(2, 5)}, r"valid must be bool \(2, 5\), got torch.float32 \(2, 5\)"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    qk, v = vectors(5)
    with pytest.raises(ValueError, match=message):
        lsh_attention(qk, v, **{"rounds": 1, "chunk": 2, "buckets": 2, "seed": 0, **options})


def test_shapes_that_do_not_fit_are_refused() -> None:
    qk, v = vectors(5)
    with pytest.raises(ValueError, match=r"qk and v must both be \(B, H, L, E\), got \(2, 2, 5, 4\), \(2, 2, 4, 4\)"):
        lsh_attention(qk, v[:, :, :4], rounds=1, chunk=2, buckets=2, seed=0)
