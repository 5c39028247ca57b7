"""LSH attention with shared queries and keys: by pairs, against Hugging Face, causal, as a stream, in evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import assert_same_values_and_gradients, disturbed, finish, masks, split_heads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import ReformerConfig as HuggingFaceConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from subquad import Mask
from subquad.benchmark.probes import run_probes
from subquad.build import build_from_config, build_mixer, make_dims, mixer_config, traits
from subquad.mechanisms.reformer import BucketCache, Reformer
from subquad.ops.lsh.hash import hash_into_buckets
from subquad.ops.lsh.lists import listed_counts

INSIDE = {"chunks": "bucket", "buckets": 4}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"buckets": (2, 4), "rounds": 3, "wrap": True},
    {"buckets": 4, "same_bucket_only": True, "dedup": True},
    INSIDE,
    INSIDE | {"causal": True},
    INSIDE | {"causal": True, "dedup": True},
    {"chunks_before": 2, "chunks_after": 1},
    {"buckets": 4, "rounds": 3, "wrap": True, "dedup": True, "chunks_before": 0, "chunks_after": 2},
    INSIDE | {"chunks_before": 0, "chunks_after": 1},
    INSIDE | {"causal": True, "chunks_before": 2},
]
SIDES = [(1, 0), (0, 0), (0, 1), (1, 1), (2, 1)]
"""Chunks before and after the own."""


def reformer(**options: Any) -> Reformer:
    mixer = build_mixer("reformer", embed_dim=8, num_heads=2, **{"chunk": 4, "rounds": 2, **options})
    assert isinstance(mixer, Reformer)
    disturbed(mixer)
    return mixer


def definition(mixer: Reformer, x: Tensor, mask: Mask | None) -> Tensor:
    """Documents one after the other, by pairs; the mixer's hash of the same shared vectors."""
    shared, v = (split_heads(mixer, layer, x).transpose(1, 2) for layer in (mixer.project_query, mixer.project_value))
    keys = shared / (shared.square().sum(dim=-1, keepdim=True) + 1e-6 * shared.shape[-1]).sqrt()
    factors = mixer.config.factors(x.shape[1])
    hashed = hash_into_buckets(shared, mixer.rotations[: mixer.config.rounds], factors)
    rule, out = mixer.config.rule(causal=mixer.dims.causal), torch.zeros_like(v)
    for b in range(x.shape[0]):
        segments = torch.zeros(x.shape[1]) if mask is None or mask.segments is None else mask.segments[b]
        valid = torch.ones(x.shape[1], dtype=torch.bool) if mask is None or mask.valid is None else mask.valid[b]
        for document in segments.unique():
            places = ((segments == document) & valid).nonzero()[:, 0]
            if not len(places):
                continue
            counts = listed_counts(hashed[b : b + 1][..., places], rule)[0].double()
            weights = counts * (shared[b][:, places] @ keys[b][:, places].mT).exp()
            out[b, :, places] = weights / weights.sum(dim=-1, keepdim=True) @ v[b][:, places]
    return finish(mixer, out.transpose(1, 2), mask)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(length=st.sampled_from([1, 2, 5, 9, 16, 27]), data=st.data())
def test_it_equals_the_definition(options: dict[str, Any], length: int, data: st.DataObject) -> None:
    mixer = reformer(**options)
    mask = data.draw(masks(2, length, segments=mixer.config.traits.segments))
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


def hugging_face(buckets: int | list[int], rounds: int, sides: tuple[int, int] = (1, 0)) -> LSHSelfAttention:
    config = HuggingFaceConfig(
        hidden_size=8,
        num_attention_heads=2,
        attention_head_size=4,
        num_buckets=buckets,
        num_hashes=rounds,
        lsh_attn_chunk_length=4,
        lsh_num_chunks_before=sides[0],
        lsh_num_chunks_after=sides[1],
        lsh_attention_probs_dropout_prob=0.0,
        hash_seed=5,
        is_decoder=False,
    )
    return LSHSelfAttention(config).double().eval()


def with_its_weights(theirs: LSHSelfAttention, columns: int, **options: Any) -> Reformer:
    """The same mixer, its output not projected, with the rotations that Hugging Face draws from its seed."""
    options |= {"chunks_before": theirs.num_chunks_before, "chunks_after": theirs.num_chunks_after}
    ours = reformer(bias=False, wrap=True, rounds=theirs.num_hashes, buckets=theirs.num_buckets, **options)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        rotations = torch.randn(2, 4, theirs.num_hashes, columns, dtype=torch.float64)
        ours.rotations.copy_(rotations.permute(2, 0, 1, 3))
        ours.project_query.weight.copy_(theirs.query_key.weight)
        ours.project_value.weight.copy_(theirs.value.weight)
        ours.project_out.weight.copy_(torch.eye(8))
    return ours.eval()


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize(("buckets", "columns"), [(8, 4), ([2, 4], 3)], ids=["one factor", "two factors"])
@pytest.mark.parametrize("missing", [0, 3])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_it_equals_hugging_face(
    buckets: int | list[int], columns: int, rounds: int, missing: int, sides: tuple[int, int]
) -> None:
    """Padding fills the last chunk at most: further chunks of padding would stand before the first one there."""
    theirs = hugging_face(buckets, rounds, sides)
    ours, x = with_its_weights(theirs, columns), torch.randn(3, 24, 8, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(3, 24, dtype=torch.bool)
    valid[1, 24 - missing :] = False
    with torch.random.fork_rng(devices=[]):
        found = theirs(x, attention_mask=valid)
    y = ours(x, mask=Mask(valid)).y
    torch.testing.assert_close(y, found.hidden_states * valid[..., None], rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(y) * valid[..., None]
    gradients = (
        torch.autograd.grad((out * weights).sum(), (x, qk, v))
        for out, qk, v in (
            (y, ours.project_query.weight, ours.project_value.weight),
            (found.hidden_states, theirs.query_key.weight, theirs.value.weight),
        )
    )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_it_equals_hugging_face_where_a_sequence_is_no_longer_than_a_chunk() -> None:
    theirs = hugging_face(8, 2)
    ours, x = with_its_weights(theirs, 4), torch.randn(3, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x).y, theirs(x).hidden_states, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"buckets": 4, "chunk": 4, "chunks_before": 2}, {"buckets": (2, 4), "rounds": 1, "dedup": True}],
    ids=str,
)
def test_every_probe_holds_for_chunks_inside_buckets(positions: Any, causal: bool, options: dict[str, Any]) -> None:
    dims = make_dims(embed_dim=8, num_heads=2, causal=causal, positions=positions)
    results = run_probes(mixer_config("reformer", chunks="bucket", **options), dims)
    assert [result.detail for result in results if not result.passed] == []
    assert {"packed documents", "content of padding"} <= {result.name for result in results}
    assert ("stream in pieces" in {result.name for result in results}) == causal


@pytest.mark.parametrize(
    "options",
    [
        {"same_bucket_only": True},
        {"dedup": True},
        {"wrap": True},
        {"buckets": 4},
        {"chunk": 4, "chunks_before": 2, "chunks_after": 1},
        {"chunk": 4, "chunks_before": 2, "chunks_after": 1, "wrap": True},
        {"chunk": 4, "chunks_after": 1, "chunks": "bucket"},
    ],
    ids=str,
)
def test_every_probe_holds_for_the_options_of_both_directions(options: dict[str, Any]) -> None:
    results = run_probes(mixer_config("reformer", **options), make_dims(embed_dim=8, num_heads=2))
    assert [result.detail for result in results if not result.passed] == []


def test_right_padding_changes_nothing_where_the_count_of_buckets_is_given() -> None:
    mixer, x = reformer(buckets=8), torch.randn(2, 30, 8, dtype=torch.float64)
    alone = mixer(x[:, :19]).y
    torch.testing.assert_close(mixer(x, mask=Mask.from_lengths([19, 19], 30)).y[:, :19], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"dedup": True}, {"chunks_before": 0}, {"chunk": 2, "chunks_before": 2}])
@given(pieces=st.lists(st.integers(1, 9), min_size=1, max_size=4), data=st.data())
def test_a_stream_equals_the_definition_over_the_whole(
    options: dict[str, Any], pieces: list[int], data: st.DataObject
) -> None:
    mixer, length = reformer(**INSIDE, causal=True, **options), sum(pieces)
    mask = data.draw(masks(2, length))
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)

    def streamed() -> Tensor:
        state, outputs, start = mixer.init_state(2), [], 0
        for part in pieces:
            cut = slice(start, start + part)
            facts = () if mask is None else (mask.valid, mask.segments)
            part_mask = Mask(*(None if fact is None else fact[:, cut] for fact in facts))
            y, state, _ = mixer(x[:, cut], mask=part_mask, state=state)
            outputs.append(y)
            start += part
        return torch.cat(outputs, dim=1)

    assert_same_values_and_gradients(mixer, streamed, lambda: definition(mixer, x, mask), [x])


def test_a_state_holds_the_tokens_and_the_buckets_of_all_rounds() -> None:
    mixer = reformer(**INSIDE, causal=True, eval_rounds=5).eval()
    x, valid = torch.randn(2, 7, 8, dtype=torch.float64), torch.tensor([[True] * 7, [False, True] * 3 + [False]])
    state = mixer(x, mask=Mask(valid), state=mixer.init_state(2)).state
    assert isinstance(state, BucketCache)
    assert state.length.tolist() == [7, 3]
    shared = split_heads(mixer, mixer.project_query, x).transpose(1, 2)
    hashed = hash_into_buckets(shared, mixer.rotations, (4,)).transpose(2, 3)
    assert torch.equal(state.buckets[0], hashed[0])
    assert torch.equal(state.buckets[1, :, :3], hashed[1][:, 1:6:2])
    torch.testing.assert_close(state.keys[1, :, :3], shared[1][:, 1:6:2])


def test_more_rounds_in_evaluation_are_those_of_a_mixer_with_more_rounds() -> None:
    few, many = reformer(rounds=2, eval_rounds=6), reformer(rounds=6)
    many.load_state_dict(few.state_dict())
    same, x = reformer(rounds=2), torch.randn(2, 33, 8, dtype=torch.float64)
    same.load_state_dict(few.state_dict() | {"rotations": few.rotations[:2]})
    assert torch.equal(few.train()(x).y, same.train()(x).y)
    assert torch.equal(few.eval()(x).y, many.eval()(x).y)
    assert not torch.allclose(few.eval()(x).y, same.eval()(x).y)


def test_rotations_are_drawn_once_from_seed_and_layer_and_saved() -> None:
    assert torch.equal(reformer().rotations, reformer().rotations)
    assert not torch.equal(reformer().rotations, reformer(layer=1).rotations)
    assert not torch.equal(reformer().rotations, reformer(seed=1).rotations)
    assert "rotations" in reformer().state_dict()


def test_training_draws_nothing_so_that_a_recompute_gives_the_same_bits() -> None:
    mixer, x = reformer().train(), torch.randn(2, 33, 8, dtype=torch.float64)
    before = torch.get_rng_state()
    assert torch.equal(mixer(x).y, mixer(x).y)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_hash_passes_no_gradient() -> None:
    """Moving a token by a gradient step that doesn't reach another bucket changes y as the gradient says."""
    mixer = reformer(buckets=2, rounds=1)
    x = torch.randn(1, 16, 8, dtype=torch.float64, requires_grad=True)
    assert not hash_into_buckets(x[:, None], mixer.rotations[:1, :1].repeat(1, 1, 2, 1), (2,)).requires_grad
    assert not mixer.rotations.requires_grad
    torch.autograd.gradcheck(lambda tokens: mixer(tokens).y, x, eps=1e-7, fast_mode=True)


def test_queries_and_keys_have_one_projection() -> None:
    names = {name.split(".")[0] for name, _ in reformer().named_parameters()}
    assert names == {"project_query", "project_value", "project_out"}


@pytest.mark.parametrize("causal", [False, True])
@given(
    size=st.integers(0, 30),
    chunk=st.sampled_from([1, 2, 4]),
    rounds=st.integers(1, 2),
    sides=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_the_price_counts_the_lists_of_equally_full_buckets(
    causal: bool, size: int, chunk: int, rounds: int, sides: tuple[int, int]
) -> None:
    before, after = sides[0], 0 if causal else sides[1]
    options: dict[str, Any] = {"chunk": chunk, "rounds": rounds, "chunks_before": before, "chunks_after": after}
    config = mixer_config("reformer", chunks="bucket", buckets=4, **options)
    dims, length = make_dims(embed_dim=8, num_heads=2, causal=causal), 4 * size
    buckets = (torch.arange(length) % 4).expand(1, 1, rounds, length)
    rule = replace(config).rule(causal=causal)  # pyright: ignore[reportAttributeAccessIssue] - the config of reformer
    pairs = int((listed_counts(buckets, rule)[0, 0] * ~torch.eye(length, dtype=torch.bool)).sum())
    expected = 3 * 2 * length * 64 + 2 * rounds * length * 8 * 2 + 4 * pairs * 8
    assert config.cost(dims, length, 4).flops == expected


def test_only_chunks_inside_buckets_are_causal_and_what_follows_from_it() -> None:
    assert not any(getattr(traits("reformer"), name) for name in ("causal", "segments", "state"))
    assert all(getattr(traits("reformer", chunks="bucket"), name) for name in ("causal", "segments", "state"))
    with pytest.raises(
        ValueError, match=r"^reformer: causal=True is not supported; .*full.*chunks='global' a later token"
    ):
        reformer(causal=True)
    with pytest.raises(ValueError, match="use chunks='bucket'"):
        reformer(causal=True)


def test_what_looks_ahead_is_not_causal() -> None:
    ahead = traits("reformer", chunks="bucket", chunks_after=1)
    assert (ahead.bidirectional, ahead.segments, ahead.causal, ahead.state) == (True, True, False, False)
    with pytest.raises(ValueError, match=r"chunks_after above 0 .* hold later ones; use .* chunks_after=0"):
        reformer(chunks="bucket", chunks_after=1, causal=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "reformer: rounds counts the hashes and must be at least 1, got 0"),
        ({"eval_rounds": 0}, "reformer: eval_rounds counts the hashes and must be at least 1, got 0"),
        ({"chunks_before": -1}, "reformer: chunks_before counts chunks .* must not be negative, got -1"),
        ({"chunks_after": -1}, "reformer: chunks_after counts chunks .* must not be negative, got -1"),
        ({"chunk": 0}, "reformer: chunk counts the tokens of a chunk and must be at least 1, got 0"),
        ({"buckets": 7}, "reformer: buckets must be 1 or even, .* got 7"),
        ({"buckets": ()}, r"reformer: buckets must be 1 or even, .* got \(\)"),
        ({"seed": -1}, "reformer: seed must be at least 0, got -1"),
        ({"wrap": True, "same_bucket_only": True}, "reformer: wrap=True .* excludes same_bucket_only=True"),
        ({"wrap": True, "chunks": "bucket"}, "reformer: wrap=True .* excludes chunks='bucket'"),
        ({"chunks": "sorted"}, "reformer: option 'chunks' must be one of 'global', 'bucket', got 'sorted'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reformer(**options)


def test_it_can_be_built_from_its_written_form() -> None:
    config = mixer_config("reformer", buckets=(4, 8), eval_rounds=8, chunks="bucket", dedup=True)
    again = type(config).from_dict(config.to_dict())
    assert again == config
    assert build_from_config(again, make_dims(embed_dim=8, num_heads=2, causal=True)).config == config
