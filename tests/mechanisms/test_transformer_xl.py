"""Transformer-XL equals its formula token by token, and XLNet's code; a stream in pieces is the stream."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparison import assert_same_values_and_gradients, disturbed, finish, is_valid, masks, split_heads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import XLNetConfig
from transformers.models.xlnet.modeling_xlnet import XLNetModel, XLNetRelativeAttention

from subquad import Mask
from subquad.build import build_mixer, make_dims
from subquad.mechanisms.transformer_xl import RecentTokens, TransformerXL, TransformerXLConfig
from subquad.models import SubquadConfig, SubquadForCausalLM

LENGTHS = st.sampled_from([1, 2, 5, 11, 23])
OPTIONS = st.fixed_dictionaries(
    {
        "memory_length": st.sampled_from([1, 3, 7, 40]),
        "segment_length": st.sampled_from([1, 2, 5, 40]),
        "same_length": st.booleans(),
        "zero_memory": st.booleans(),
        "clamp_length": st.sampled_from([None, 0, 4]),
    }
)
EVALUATION = st.fixed_dictionaries(
    {
        "eval_memory_length": st.sampled_from([None, 2, 9]),
        "eval_same_length": st.sampled_from([None, False, True]),
        "eval_clamp_length": st.sampled_from([None, 0, 3, 50]),
    }
)
PIECES = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def transformer_xl(**options: Any) -> TransformerXL:
    mixer = disturbed(TransformerXL(TransformerXLConfig(**options), make_dims(embed_dim=4, num_heads=2, causal=True)))
    assert isinstance(mixer, TransformerXL)
    return mixer


def encoding(distance: int, mixer: TransformerXL) -> Tensor:
    """R of a distance, for a stream of width 4."""
    clamp = mixer.rule.clamp_length
    angle = distance if clamp is None else min(distance, clamp)
    values = [math.sin(angle), math.sin(angle / 100), math.cos(angle), math.cos(angle / 100)]
    return torch.tensor(values, dtype=torch.float64)


def read(mixer: TransformerXL, inputs: list[Tensor], own: int) -> Tensor:
    """What the last of these inputs (D,) reads from all of them (H, E); those before `own` are memory."""
    source = torch.stack([x.detach() if j < own else x for j, x in enumerate(inputs)])[None]
    q = split_heads(mixer, mixer.project_query, inputs[-1])
    k, v = (split_heads(mixer, layer, source)[0] for layer in (mixer.project_key, mixer.project_value))
    table = torch.stack([encoding(distance, mixer) for distance in range(len(inputs) - 1, -1, -1)])
    r = (table @ mixer.project_distance.T).unflatten(-1, (mixer.dims.num_heads, -1))
    scores = torch.einsum("he,jhe->hj", q + mixer.content_bias, k)
    scores = scores + torch.einsum("he,jhe->hj", q + mixer.position_bias, r)
    return torch.einsum("hj,jhe->he", (scores / q.shape[-1] ** 0.5).softmax(dim=1), v)


def definition(mixer: TransformerXL, x: Tensor, mask: Mask | None) -> Tensor:
    """One token after the other, in segments from the start of the stream."""
    config, rows = mixer.config, []
    size, (memory, same_length, _) = config.segment_length or x.shape[1], mixer.rule
    for b in range(x.shape[0]):
        stream, outputs = [], []
        for i in range(x.shape[1]):
            if not is_valid(mask, b, i):
                outputs.append(x.new_zeros(mixer.dims.num_heads, mixer.dims.head_dim))
                continue
            stream.append(x[b, i])
            place = len(stream) - 1
            own = place - place % size
            first = max(own - memory, place - memory + 1) if same_length else own - memory
            seen = [x.new_zeros(x.shape[2])] * max(0, -first) + stream[max(0, first) :]
            seen = seen if config.zero_memory else stream[max(0, first) :]
            outputs.append(read(mixer, seen, len(seen) - 1 - (place - own)))
        rows.append(torch.stack(outputs))
    return finish(mixer, torch.stack(rows), mask)


def streamed(mixer: TransformerXL, x: Tensor, pieces: list[int], mask: Mask | None = None) -> tuple[Tensor, Any]:
    state, outputs, start = mixer.init_state(x.shape[0]), [], 0
    for part in pieces:
        cut = slice(start, start + part)
        valid = None if mask is None or mask.valid is None else mask.valid[:, cut]
        y, state, _ = mixer(x[:, cut], mask=None if valid is None else Mask(valid), state=state)
        outputs.append(y)
        start += part
    return torch.cat(outputs, dim=1), state


@given(length=LENGTHS, options=OPTIONS, whole=st.booleans(), data=st.data())
def test_it_equals_the_formula(length: int, options: dict[str, Any], whole: bool, data: st.DataObject) -> None:
    mixer = transformer_xl(**options | ({"segment_length": None} if whole else {}))
    mask = data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@given(length=LENGTHS, options=OPTIONS, evaluation=EVALUATION, data=st.data())
def test_in_evaluation_it_equals_the_formula_of_the_options_for_evaluation(
    length: int, options: dict[str, Any], evaluation: dict[str, Any], data: st.DataObject
) -> None:
    mixer, mask = transformer_xl(**options, **evaluation), data.draw(masks(2, length, segments=False))
    trained = transformer_xl(**options)
    trained.load_state_dict(mixer.state_dict())
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(mixer(x, mask=mask).y, trained(x, mask=mask).y, rtol=0, atol=0)
    mixer.eval()
    named = {name.removeprefix("eval_"): value for name, value in evaluation.items() if value is not None}
    assert mixer.rule == TransformerXLConfig(**options | named).rule(training=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@given(pieces=PIECES, options=OPTIONS, evaluation=EVALUATION, whole=st.booleans(), data=st.data())
def test_with_cached_keys_evaluation_gives_the_same(
    pieces: list[int], options: dict[str, Any], evaluation: dict[str, Any], whole: bool, data: st.DataObject
) -> None:
    given_options: dict[str, Any] = options | evaluation | ({"segment_length": None} if whole else {})
    mixer, mask = transformer_xl(**given_options), data.draw(masks(2, sum(pieces), segments=False))
    cached = transformer_xl(**given_options, cache_keys=True)
    cached.load_state_dict(mixer.state_dict())
    x = torch.randn(2, sum(pieces), 4, dtype=torch.float64)
    y, state = streamed(cached.eval(), x, pieces, mask)
    torch.testing.assert_close(y, streamed(mixer.eval(), x, pieces, mask)[0], rtol=1e-10, atol=1e-10)
    assert state.hidden.shape[1] == 0
    assert not state.keys.requires_grad


def test_cached_keys_are_of_evaluation_alone() -> None:
    mixer, x = transformer_xl(cache_keys=True, memory_length=5), torch.randn(2, 3, 4, dtype=torch.float64)
    trained, evaluated = mixer.init_state(2), mixer.eval().init_state(2)
    assert isinstance(trained, RecentTokens)
    assert (trained.hidden.shape, trained.keys.shape) == ((2, 5, 4), (2, 2, 0, 2))
    with pytest.raises(ValueError, match=r"state\.keys has shape \(B, 2, 0, 2\), expected \(B, 2, 5, 2\)"):
        mixer(x, state=trained)
    with pytest.raises(ValueError, match=r"state\.hidden has shape \(B, 0, 4\), expected \(B, 5, 4\)"):
        mixer.train()(x, state=evaluated)


@pytest.mark.parametrize("segment_length", [None, 4])
def test_cached_keys_of_a_stream_are_not_projected_again(segment_length: int | None) -> None:
    mixer = transformer_xl(cache_keys=True, memory_length=9, segment_length=segment_length).eval()
    x, rows = torch.randn(1, 9, 4, dtype=torch.float64), []
    mixer.project_key.register_forward_hook(lambda _, arguments, y: rows.append(arguments[0].shape[1]))
    with torch.no_grad():
        streamed(mixer, x, [6, 2, 1])
    assert rows == [6, 2, 1]


@given(pieces=PIECES, options=OPTIONS, data=st.data())
def test_any_partition_of_a_stream_gives_the_same_values_and_gradients_of_parameters(
    pieces: list[int], options: dict[str, Any], data: st.DataObject
) -> None:
    mixer, length = transformer_xl(**options), sum(pieces)
    mask = data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(
        mixer, lambda: streamed(mixer, x, pieces, mask)[0], lambda: mixer(x, mask=mask).y, [x]
    )


@given(pieces=PIECES)
def test_while_the_memory_holds_the_stream_calls_of_any_size_are_segments_of_no_consequence(pieces: list[int]) -> None:
    mixer, x = transformer_xl(memory_length=sum(pieces)), torch.randn(2, sum(pieces), 4, dtype=torch.float64)
    torch.testing.assert_close(streamed(mixer, x, pieces)[0], mixer(x).y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("segments", [(4, 4, 4), (3, 5, 1, 3)])
def test_it_equals_the_attention_of_xlnet(segments: tuple[int, ...]) -> None:
    mixer, memory = transformer_xl(memory_length=5), 5
    config = XLNetConfig(vocab_size=3, d_model=4, n_layer=1, n_head=2, d_inner=4, attn_type="uni", dropout=0)
    model = XLNetModel(config).double().eval()
    peer = XLNetRelativeAttention(config).double().eval()
    with torch.no_grad():
        for layer in (mixer.project_query, mixer.project_key, mixer.project_value, mixer.project_out):
            layer.bias.zero_()
        for weight, projection in (
            (peer.q, mixer.project_query.weight),
            (peer.k, mixer.project_key.weight),
            (peer.v, mixer.project_value.weight),
            (peer.r, mixer.project_distance),
        ):
            weight.copy_(projection.T.unflatten(1, (2, 2)))
        peer.o.copy_(mixer.project_out.weight.unflatten(1, (2, 2)))
        peer.r_w_bias.copy_(mixer.content_bias)
        peer.r_r_bias.copy_(mixer.position_bias)
        peer.add_module("layer_norm", torch.nn.Identity())  # what it adds to the input is compared
    x = torch.randn(2, sum(segments), 4, dtype=torch.float64)
    outputs, memories, start = [], torch.zeros(0, 2, 4, dtype=torch.float64), 0
    for length in segments:
        h = x[:, start : start + length].transpose(0, 1)
        keys = len(memories) + length
        hidden = torch.ones(length, keys, dtype=torch.float64).triu(1 + len(memories))[:, :, None, None]
        r = model.relative_positional_encoding(length, keys, bsz=2).double()
        y = peer(h, None, hidden, None, r, None, mems=memories)[0]
        outputs.append((y - h).transpose(0, 1))
        memories = torch.cat((memories, h))[-memory:]
        start += length
    found = streamed(mixer, x, list(segments))[0]
    torch.testing.assert_close(found, torch.cat(outputs, dim=1), rtol=1e-6, atol=1e-6)  # its sinusoids are float32


def test_without_biases_and_distances_it_is_dense_attention() -> None:
    mixer = transformer_xl(memory_length=3)
    with torch.no_grad():
        for parameter in (mixer.content_bias, mixer.position_bias, mixer.project_distance):
            parameter.zero_()
    dense = build_mixer("full", embed_dim=4, num_heads=2, causal=True).double()
    own = mixer.state_dict()
    dense.load_state_dict({name: own[name] for name in dense.state_dict()})
    x = torch.randn(2, 19, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x).y, dense(x).y, rtol=1e-10, atol=1e-10)


def seen_by(mixer: TransformerXL, length: int, calls: list[int], token: int) -> list[int]:
    """Tokens whose change moves the output of `token`, in a stream of these calls."""
    x = torch.randn(length, 4, dtype=torch.float64)
    others = x.repeat(length + 1, 1, 1)
    others[torch.arange(length), torch.arange(length)] += 1.0
    with torch.no_grad():
        y = streamed(mixer, others, calls)[0][:, token]
    return [j for j in range(length) if not torch.equal(y[j], y[length])]


def test_a_token_sees_its_segment_so_far_and_the_memory_before_it() -> None:
    mixer = transformer_xl(memory_length=3)
    assert seen_by(mixer, 12, [5, 4, 3], 6) == [2, 3, 4, 5, 6]
    assert seen_by(mixer, 12, [5, 4, 3], 11) == [6, 7, 8, 9, 10, 11]
    cut = transformer_xl(memory_length=3, segment_length=4)
    assert seen_by(cut, 12, [5, 4, 3], 6) == [1, 2, 3, 4, 5, 6]
    assert seen_by(cut, 12, [12], 11) == [5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("calls", [[12], [5, 4, 3], [1] * 12])
def test_with_same_length_every_token_sees_as_many(calls: list[int]) -> None:
    for segment_length in (None, 4):
        mixer = transformer_xl(memory_length=4, segment_length=segment_length, same_length=True)
        assert seen_by(mixer, 12, calls, 2) == [0, 1, 2]
        for token in (3, 7, 8, 11):
            assert seen_by(mixer, 12, calls, token) == [token - 3, token - 2, token - 1, token]


def test_the_memory_may_be_longer_in_evaluation_and_a_stream_goes_on_there() -> None:
    mixer = transformer_xl(memory_length=2, eval_memory_length=6)
    assert seen_by(mixer, 12, [9, 3], 9) == [7, 8, 9]
    assert seen_by(mixer.eval(), 12, [9, 3], 9) == [3, 4, 5, 6, 7, 8, 9]
    x = torch.randn(2, 12, 4, dtype=torch.float64)
    state = streamed(mixer.train(), x[:, :9], [5, 4])[1]
    longer = transformer_xl(memory_length=6)
    longer.load_state_dict(mixer.state_dict())
    expected = longer(x[:, 9:], state=streamed(longer, x[:, :9], [9])[1]).y
    torch.testing.assert_close(mixer.eval()(x[:, 9:], state=state).y, expected, rtol=1e-10, atol=1e-10)


def test_gradients_stop_at_the_segment_and_cross_calls_inside_it() -> None:
    for segment_length, told in ((4, [4, 5, 6]), (None, [5, 6]), (2, [6])):
        mixer = transformer_xl(memory_length=6, segment_length=segment_length)
        x = torch.randn(1, 7, 4, dtype=torch.float64, requires_grad=True)
        for pieces in ([5, 2], [2, 3, 1, 1]) if segment_length else ([5, 2],):
            (gradient,) = torch.autograd.grad(streamed(mixer, x, pieces)[0][0, 6].square().sum(), x)
            assert gradient[0].abs().sum(dim=1).nonzero()[:, 0].tolist() == told


def test_the_weights_learn_from_memory() -> None:
    mixer = transformer_xl(memory_length=6)
    x = torch.randn(1, 7, 4, dtype=torch.float64)

    def loss(memory_too: bool) -> Tensor:
        _, state = streamed(mixer, x[:, :6], [6])
        y = mixer(x[:, 6:], state=state).y.square().sum()
        (gradient,) = torch.autograd.grad(y, mixer.project_value.weight)
        return gradient if memory_too else y

    step = 1e-6 * torch.randn_like(mixer.project_value.weight)
    slope = (loss(True) * step).sum()
    with torch.no_grad():
        before = mixer.project_value.weight.clone()
        mixer.project_value.weight += step
    above = loss(False)
    with torch.no_grad():
        mixer.project_value.weight.copy_(before - step)
    torch.testing.assert_close((above - loss(False)) / 2, slope, rtol=1e-5, atol=0)


def test_no_graph_grows_from_segment_to_segment() -> None:
    mixer = transformer_xl(memory_length=6, segment_length=4)
    for pieces, live in (([4], False), ([3], True), ([3, 5], False), ([4, 4, 1], True)):
        state = streamed(mixer, torch.randn(2, sum(pieces), 4, dtype=torch.float64, requires_grad=True), pieces)[1]
        assert state.hidden.requires_grad
        x = torch.randn(2, 1, 4, dtype=torch.float64)
        gradient = torch.autograd.grad(mixer(x, state=state).y.sum(), state.hidden, allow_unused=True)[0]
        assert gradient is not None
        assert bool(gradient.any()) == live
    mixer = transformer_xl(memory_length=6)
    assert not streamed(mixer, torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True), [9])[
        1
    ].hidden.requires_grad


@pytest.mark.parametrize("segment_length", [None, 4])
def test_a_stored_state_goes_on_to_the_same_bits(segment_length: int | None) -> None:
    mixer = transformer_xl(memory_length=5, segment_length=segment_length).eval()
    x = torch.randn(3, 17, 4, dtype=torch.float64)
    state = streamed(mixer, x[:, :10], [6, 4])[1]
    snapshot = RecentTokens(*(getattr(state, field).clone() for field in ("length", "hidden", "keys", "values")))
    expected = mixer(x[:, 10:], state=state).y
    assert torch.equal(mixer(x[:, 10:], state=snapshot).y, expected)
    beams = torch.tensor([2, 0, 0, 1])
    torch.testing.assert_close(mixer(x[beams, 10:], state=state.index_select(beams)).y, expected[beams])


def test_the_state_holds_the_last_inputs_without_padding() -> None:
    mixer = transformer_xl(memory_length=3, segment_length=2, eval_memory_length=2)
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    valid = torch.tensor([[True] * 7, [False, True, False, False, True, True, False]])
    state = mixer(x, mask=Mask(valid), state=mixer.init_state(2)).state
    assert isinstance(state, RecentTokens)
    assert state.length.tolist() == [7, 3]
    assert torch.equal(state.hidden[0], x[0, 3:])
    assert torch.equal(state.hidden[1], torch.cat((torch.zeros(1, 4), x[1, [1, 4, 5]])))


def test_an_attended_memory_of_zeros_takes_its_share() -> None:
    for zero_memory, share in ((True, 9.0), (False, 1.0)):
        mixer = transformer_xl(memory_length=8, zero_memory=zero_memory)
        with torch.no_grad():
            for name, parameter in mixer.named_parameters():
                if not name.startswith(("project_value.weight", "project_out.weight")):
                    parameter.zero_()
        x = torch.randn(1, 1, 4, dtype=torch.float64)
        expected = x @ mixer.project_value.weight.T @ mixer.project_out.weight.T / share
        torch.testing.assert_close(mixer(x).y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("options", "reach"), [({}, 8), ({"same_length": True}, 7), ({"cache_keys": True}, 8)])
@pytest.mark.parametrize("calls", [[16], [4, 4, 4, 4], [5, 9, 2]])
def test_two_layers_see_as_far_as_two_memories_and_no_further(
    options: dict[str, Any], reach: int, calls: list[int]
) -> None:
    torch.manual_seed(0)
    mixer = {"name": "transformer_xl", "memory_length": 4, "segment_length": 4, **options}
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
    }
    config = SubquadConfig(vocab_size=11, mixer=mixer, causal=True, positions="none", **sizes)
    model, ids = SubquadForCausalLM(config).eval(), torch.randint(11, (1, 16))

    def logits(changed: int | None) -> Tensor:
        stream, cache, found = ids.clone(), None, []
        if changed is not None:
            stream[0, changed] = (stream[0, changed] + 1) % 11
        for part in stream.split(calls, dim=1):
            output = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
        return torch.cat(found, dim=1)

    with torch.no_grad():
        told = [j for j in range(16) if not torch.equal(logits(j)[0, 12], logits(None)[0, 12])]
    assert told == list(range(12 - reach + (0 if "same_length" not in options else 1), 13))


def test_outputs_depend_on_distances_alone() -> None:
    mixer = transformer_xl(memory_length=4, same_length=True)
    x = torch.randn(1, 20, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x).y[:, 10:], mixer(x[:, 7:]).y[:, 3:], rtol=1e-10, atol=1e-10)


def test_both_biases_are_those_of_all_layers_unless_untied() -> None:
    mixer = transformer_xl()
    assert mixer.shared_parameters() == ("content_bias", "position_bias")
    assert transformer_xl(share_biases=False).shared_parameters() == ()


@given(length=st.integers(0, 40), options=OPTIONS, whole=st.booleans())
def test_the_price_counts_the_visible_pairs(length: int, options: dict[str, Any], whole: bool) -> None:
    given_options: dict[str, Any] = options | ({"segment_length": None} if whole else {})
    config = TransformerXLConfig(**given_options)
    size, memory, pairs, distances, clamp = config.segment_length or 40, config.memory_length, 0, set(), 40
    clamp = clamp if config.clamp_length is None else config.clamp_length
    for i in range(length):
        for j in range(-memory if config.zero_memory else 0, i + 1):
            if j >= i - i % size - memory and (not config.same_length or i - j < memory):
                pairs += 1
                distances.add(min(i - j, 2 * clamp if config.clamp_length is None else clamp))
    zeros = memory if config.zero_memory and length else 0
    dims = make_dims(embed_dim=4, num_heads=2, head_dim=4, causal=True)
    expected = 2 * (4 * length + len(distances) + 2 * zeros) * 4 * 8 + 3 * 2 * pairs * 8
    assert config.cost(dims, length, 4).flops == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_length": -1}, "transformer_xl: memory_length must be at least 0, got -1"),
        ({"memory_length": 0, "same_length": True}, "transformer_xl: memory_length must be at least 1, got 0"),
        ({"eval_memory_length": -2}, "transformer_xl: eval_memory_length must be at least 0, got -2"),
        ({"segment_length": 0}, "transformer_xl: segment_length must be at least 1, got 0"),
        (
            {"memory_length": 0, "eval_same_length": True},
            "same_length needs a memory_length of at least 1, in evaluation",
        ),
        ({"eval_clamp_length": -1}, "transformer_xl: eval_clamp_length must be at least 0, got -1"),
        ({"clamp_length": -1}, "transformer_xl: clamp_length must be at least 0, got -1"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer("transformer_xl", embed_dim=8, num_heads=2, causal=True, **options)
