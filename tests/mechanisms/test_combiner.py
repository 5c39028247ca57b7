"""Combiner as a mixer: its plans equal their definitions, and rows may be summarised by projections."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparison import assert_same_values_and_gradients, disturbed, finish, masks, qkv, softmax_over, streamed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad import Mask
from subquad.build import build_mixer, traits
from subquad.layers.combiner_stream import CombinerState
from subquad.layers.row_summary import RowSummary
from subquad.mechanisms.combiner import Combiner
from subquad.ops.combiner import stream
from subquad.ops.combiner.attention import Summarize, combiner_attention_by_regions

BOTH_FORMS = pytest.mark.parametrize("causal", [False, True])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"pooling": "mean", "log_size_bias": True},
    {"activation": "deepset"},
    {"activation": "relu", "pooling": "sum"},
    {"plan": "logsparse"},
    {"plan": "vertical"},
    {"plan": "horizontal", "activation": "deepset", "pooling": "sum"},
    {"plan": "rowmajor", "row_summary": "none"},
    {"plan": "rowmajor", "row_summary": "wsum"},
    {"plan": "rowmajor"},
    {"plan": "rowmajor", "row_summary": "wsum_proj"},
    *({"plan": "rowmajor", "row_summary": key, "log_size_bias": True} for key in ("none", "wsum", "proj", "wsum_proj")),
    {"plan": "mixture"},
    {"plan": "mixture", "mixture": "joint"},
]


def combiner(*, causal: bool = True, **options: Any) -> Combiner:
    mixer = build_mixer("combiner", embed_dim=4, num_heads=2, causal=causal, **{"block": 3, **options})
    assert isinstance(mixer, Combiner)
    disturbed(mixer)
    return mixer


def definition(mixer: Combiner, x: Tensor, mask: Mask | None) -> Tensor:
    """The valid tokens of each example alone, padding left out."""
    valid = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None or mask.valid is None else mask.valid
    out = []
    for b in range(x.shape[0]):
        of_tokens = x[b : b + 1, valid[b]]
        found = by_rows(mixer, of_tokens) if mixer.row_summary is not None else by_plans(mixer, of_tokens)
        rows = torch.zeros(*x.shape[1:2], *found.shape[2:], dtype=x.dtype) + 0 * x[b].sum()
        out.append(rows.index_put((valid[b].nonzero()[:, 0],), found[0]))
    return finish(mixer, torch.stack(out), mask)


def by_plans(mixer: Combiner, x: Tensor) -> Tensor:
    config = mixer.config
    summarize = Summarize(
        config.pooling, config.activation, mixer.query_features, mixer.key_features, config.log_size_bias
    )
    q, k, v = (part.transpose(1, 2) for part in qkv(mixer, x))
    if not x.shape[1]:
        return q.transpose(1, 2)
    found = [
        combiner_attention_by_regions(q, k, v, plan, causal=mixer.dims.causal, summarize=summarize)
        for plan in config.plans()
    ]
    return torch.stack(found).mean(dim=0).transpose(1, 2)


def by_rows(mixer: Combiner, x: Tensor) -> Tensor:
    """Loops over tokens and rows; x (1, L, D)."""
    width, length, config = mixer.config.block, x.shape[1], mixer.config
    assert isinstance(mixer.row_summary, RowSummary)
    q, k, v = (part[0] for part in qkv(mixer, x))
    starts, out = range(0, length, width), []
    for i in range(length):
        own, column = i // width, i % width
        seen = [j for j in range(own * width, min((own + 1) * width, length)) if j <= i or not mixer.dims.causal]
        keys, values, added = [k[j] for j in seen], [v[j] for j in seen], [0.0 for _ in seen]
        for row, start in enumerate(starts):
            if row == own or (mixer.dims.causal and row > own):
                continue
            asking, members = start + column, list(range(start, min(start + width, length)))
            query, token = (x[0] * 0, q * 0) if asking >= length else (x[0], q)
            query, token = (query[min(asking, length - 1)], token[min(asking, length - 1)])
            value = softmax_over(token, k[members], v[members])
            average = value if config.row_summary == "proj" else softmax_over(token, k[members], k[members])
            keys.append(mixer.row_summary(query, average.flatten()).unflatten(-1, (2, -1)))
            values.append(value)
            added.append(math.log(len(members)) if config.log_size_bias else 0.0)
        bias = torch.tensor(added, dtype=x.dtype)
        out.append(softmax_over(q[i], torch.stack(keys), torch.stack(values), bias))
    return torch.stack(out)[None] if out else q[None]


@BOTH_FORMS
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(length=st.integers(1, 16), data=st.data())
def test_it_equals_the_definition(options: dict[str, Any], causal: bool, length: int, data: st.DataObject) -> None:
    if not causal and options.get("mixture") == "joint":
        return
    mixer, mask = combiner(causal=causal, **options), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@pytest.mark.parametrize("options", [*OPTIONS, {"plan": "vertical", "block": 1}], ids=str)
@given(pieces=st.lists(st.integers(1, 7), min_size=1, max_size=5), data=st.data())
def test_a_stream_in_pieces_equals_the_definition(
    options: dict[str, Any], pieces: list[int], data: st.DataObject
) -> None:
    """Pieces end inside rows, at their borders and rows later; examples are at different places."""
    mixer, mask = combiner(**options), data.draw(masks(2, sum(pieces), segments=False))
    x = torch.randn(2, sum(pieces), 4, dtype=torch.float64, requires_grad=True)

    assert_same_values_and_gradients(
        mixer, lambda: streamed(mixer, x, mask, pieces), lambda: definition(mixer, x, mask), [x]
    )


@pytest.mark.parametrize("length", [1, 2, 3, 11, 12, 13, 31])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_price_of_a_state_is_what_it_holds(options: dict[str, Any], length: int) -> None:
    mixer = combiner(**options)
    state = mixer(torch.randn(1, length, 4, dtype=torch.float64), state=mixer.init_state(1)).state
    assert isinstance(state, CombinerState)
    assert mixer.config.cost(mixer.dims, length, 8).state_bytes == state.nbytes - state.length.nbytes


@pytest.mark.parametrize(
    ("options", "tokens", "summaries"),
    [
        ({}, 2, 3),
        ({"plan": "logsparse"}, 11, 2),
        ({"plan": "vertical"}, 11, 3),
        ({"plan": "horizontal"}, 11, 9),
        ({"plan": "rowmajor"}, 2, 9),
        ({"plan": "mixture"}, 11, 12),
        ({"plan": "mixture", "mixture": "joint"}, 11, 21),
    ],
    ids=str,
)
def test_a_state_keeps_what_later_tokens_see(options: dict[str, Any], tokens: int, summaries: int) -> None:
    """After 11 tokens in rows of 3; 11 is 1011 in binary, the lowest bit of which is a token."""
    mixer = combiner(**options)
    state = mixer(torch.randn(1, 11, 4, dtype=torch.float64), state=mixer.init_state(1)).state
    assert isinstance(state, CombinerState)
    assert (state.keys.shape[2], state.summary_keys.shape[2]) == (tokens, summaries)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_long_calls_are_computed_in_parts(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = combiner(**options), torch.randn(2, 23, 4, dtype=torch.float64)
    monkeypatch.setattr(stream, "LARGEST_SLICE", 64)
    begun = mixer(x[:, :4], state=mixer.init_state(2))
    torch.testing.assert_close(mixer(x[:, 4:], state=begun.state).y, mixer(x).y[:, 4:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_prefix_gives_the_prefix(options: dict[str, Any]) -> None:
    mixer, x = combiner(**options), torch.randn(2, 20, 4, dtype=torch.float64)
    y = mixer(x).y
    for cut in (1, 2, 3, 7, 9, 19):
        torch.testing.assert_close(mixer(x[:, :cut]).y, y[:, :cut], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_future_is_not_seen(options: dict[str, Any]) -> None:
    mixer, x = combiner(**options), torch.randn(1, 20, 4, dtype=torch.float64)
    y = mixer(x).y
    for cut in (1, 4, 9, 19):
        changed = torch.cat((x[:, :cut], 1000 * torch.randn_like(x[:, cut:])), dim=1)
        assert torch.equal(mixer(changed).y[:, :cut], y[:, :cut])


@BOTH_FORMS
def test_with_one_segment_it_is_dense_attention(causal: bool) -> None:
    mixer, x = combiner(causal=causal, block=16), torch.randn(2, 16, 4, dtype=torch.float64)
    dense = build_mixer("full", embed_dim=4, num_heads=2, causal=causal).double()
    dense.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x).y, dense(x).y, rtol=1e-10, atol=1e-10)


PLANS_OF_ONE: list[dict[str, Any]] = [
    {"plan": "fixed"},
    {"plan": "fixed", "activation": "relu"},
    {"plan": "fixed", "pooling": "sum"},
    {"plan": "vertical", "activation": "relu"},
    {"plan": "horizontal"},
    {"plan": "horizontal", "activation": "relu"},
    {"plan": "rowmajor"},
    *({"plan": "rowmajor", "row_summary": key} for key in ("none", "wsum")),
    *({"plan": "mixture", "mixture": mixture} for mixture in ("mean", "joint")),
    {"plan": "logsparse"},
]
"""With one token in every segment or row."""


@pytest.mark.parametrize("options", [*PLANS_OF_ONE, *({**options, "block": 2} for options in PLANS_OF_ONE)], ids=str)
def test_it_is_softmax_attention_where_its_traits_say_so(options: dict[str, Any]) -> None:
    options = {"block": 1, **options}
    mixer, x = combiner(**options), torch.randn(2, 9, 4, dtype=torch.float64)
    dense = build_mixer("full", embed_dim=4, num_heads=2, causal=True).double()
    dense.load_state_dict({name: mixer.state_dict()[name] for name in dense.state_dict()})
    assert torch.allclose(mixer(x).y, dense(x).y, rtol=1e-10, atol=1e-10) == mixer.config.traits.approximates_softmax


def test_the_mean_mixture_is_the_mean_of_two_plans() -> None:
    mixed, x = combiner(plan="mixture"), torch.randn(2, 17, 4, dtype=torch.float64)
    parts = [combiner(plan=plan) for plan in ("vertical", "horizontal")]
    for part in parts:
        part.load_state_dict(mixed.state_dict())
    mean = (parts[0](x).y + parts[1](x).y) / 2
    torch.testing.assert_close(mixed(x).y, mean, rtol=1e-10, atol=1e-10)


def test_what_a_plan_has_is_what_its_traits_say() -> None:
    assert traits("combiner").bidirectional
    assert not traits("combiner", plan="mixture", mixture="joint").bidirectional
    with pytest.raises(ValueError, match="combiner: causal=False is not supported"):
        combiner(causal=False, plan="mixture", mixture="joint")


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="combiner: block counts the tokens of a segment or row, at least 1; got 0"):
        combiner(block=0)
    with pytest.raises(ValueError, match="row_summary='wsum' is an option of plan='rowmajor' and this is plan='fixed'"):
        combiner(row_summary="wsum")
    with pytest.raises(ValueError, match="mixture='joint' is an option of plan='mixture' and this is plan='vertical'"):
        combiner(plan="vertical", mixture="joint")
    with pytest.raises(ValueError, match="plan='rowmajor' pools nothing; leave pooling and activation out, got 'mean'"):
        combiner(plan="rowmajor", pooling="mean")
