"""LogSparse attention sees distances that double, and a convolution that makes queries and keys stays in a document."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from comparison import (
    assert_same_values_and_gradients,
    attend_by_loops,
    disturbed,
    finish,
    is_valid,
    masks,
    same_document,
    split_heads,
    streamed,
)
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from subquad import Mask
from subquad.build import build_mixer, make_dims
from subquad.layers.heads import HeadMixer
from subquad.mechanisms.logsparse import Convolution, ConvolutionCache, LogSparse, LogSparseConfig
from subquad.ops.rotary import rotate
from subquad.patterns import Causal, Log, Tile
from subquad.patterns.doubling import DoublingDistances

BOTH_FORMS = pytest.mark.parametrize("causal", [False, True])
PATTERNS = st.builds(
    DoublingDistances, st.integers(1, 12), st.sampled_from([None, 1, 2, 5, 8, 13, 64]), both=st.booleans()
)


def logsparse(*, causal: bool = True, **options: Any) -> LogSparse:
    mixer = build_mixer("logsparse", embed_dim=4, num_heads=2, causal=causal, **options)
    assert isinstance(mixer, LogSparse)
    disturbed(mixer)
    return mixer


def is_step(distance: int, local: int, restart: int | None) -> bool:
    """Whether a range shows a distance, spelled out."""
    distance = distance if restart is None else distance % restart
    return distance < local or distance - local + 1 in (1, 2, 4, 8, 16, 32, 64, 128, 256)


def dense(pattern: DoublingDistances, length: int) -> list[list[bool]]:
    def sees(i: int, j: int) -> bool:
        return (pattern.both or j <= i) and is_step(abs(i - j), pattern.local, pattern.restart)

    return [[sees(i, j) for j in range(length)] for i in range(length)]


def convolved(mixer: HeadMixer, convolution: Convolution, x: Tensor, documents: list[list[list[int]]]) -> Tensor:
    """torch's own convolution over the valid tokens of one document after the other; zeros elsewhere (B, L, H, E)."""
    width = convolution.kernel
    weight = convolution.weight.permute(0, 2, 3, 1).flatten(0, 1).flip(-1)
    sides = (width - 1, 0) if mixer.dims.causal else ((width - 1) // 2, (width - 1) // 2)
    out = torch.zeros(*x.shape[:2], mixer.dims.inner_dim, dtype=x.dtype)
    for b, of_example in enumerate(documents):
        for tokens in of_example:
            alone = F.conv1d(F.pad(x[b, tokens].T, sides)[None], weight, convolution.bias)[0].T
            rows = torch.arange(x.shape[1])[:, None] == torch.tensor(tokens)
            out = out + F.pad((rows.to(x.dtype) @ alone)[None], (0, 0, 0, 0, b, x.shape[0] - 1 - b))
    return out.unflatten(-1, (mixer.dims.num_heads, -1))


def documents_of(x: Tensor, mask: Mask | None) -> list[list[list[int]]]:
    """The valid tokens of every document of every example."""
    found = []
    for b in range(x.shape[0]):
        of_example: list[list[int]] = []
        for i in (i for i in range(x.shape[1]) if is_valid(mask, b, i)):
            if of_example and same_document(mask, b, of_example[-1][0], i):
                of_example[-1].append(i)
            else:
                of_example.append([i])
        found.append(of_example)
    return found


def definition(mixer: LogSparse, x: Tensor, mask: Mask | None) -> Tensor:
    config, documents = mixer.config, documents_of(x, mask)
    places = [{i: place for tokens in of_example for place, i in enumerate(tokens)} for of_example in documents]
    q, k = (
        convolved(mixer, projection, x, documents)
        if isinstance(projection, Convolution)
        else split_heads(mixer, projection, x)
        for projection in (mixer.project_query, mixer.project_key)
    )
    if mixer.dims.positions == "rotary":
        positions = torch.tensor([[at.get(i, 0) for i in range(x.shape[1])] for at in places])
        q, k = (rotate(tensor.transpose(1, 2), positions).transpose(1, 2) for tensor in (q, k))

    def sees(b: int, i: int, j: int) -> bool:
        if not (same_document(mask, b, i, j) and is_valid(mask, b, i) and is_valid(mask, b, j)):
            return False
        distance = places[b][i] - places[b][j]
        return (distance >= 0 or not mixer.dims.causal) and is_step(abs(distance), config.local, config.restart)

    return finish(mixer, attend_by_loops(q, k, split_heads(mixer, mixer.project_value, x), sees), mask)


@given(pattern=PATTERNS, length=st.integers(1, 70))
def test_the_pattern_and_the_count_of_its_pairs_are_those_of_the_rule(pattern: DoublingDistances, length: int) -> None:
    expected = dense(pattern, length)
    assert pattern.dense(length).tolist() == expected
    assert pattern.pairs(length) == sum(map(sum, expected))
    assert pattern.keys_per_query(length).tolist() == [sum(row) for row in expected]


@given(
    pattern=PATTERNS,
    corner=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_rectangles_are_classified_by_what_is_visible(
    pattern: DoublingDistances, corner: tuple[int, int], sides: tuple[int, int]
) -> None:
    i, j = (range(first, first + side) for first, side in zip(corner, sides, strict=True))
    seen = [row[j.start : j.stop] for row in dense(pattern, 50)[i.start : i.stop]]
    ends = (np.array([end]) for end in (i[0], i[-1], j[0], j[-1]))
    known = Tile.FULL if all(map(all, seen)) else Tile.PARTIAL if any(map(any, seen)) else Tile.EMPTY
    assert pattern.tiles(*ends).tolist() == [known]


def test_without_options_it_is_the_pattern_of_powers_of_two() -> None:
    causal, both = (LogSparseConfig().pattern(causal=causal).dense(70) for causal in (True, False))
    assert causal.equal(Log().dense(70))
    assert both.equal(causal | causal.T)
    assert LogSparseConfig().pattern(causal=True).pairs(9) == 9 + sum(i.bit_length() for i in range(9))


def test_the_last_row_of_64_is_the_published_one() -> None:
    row = DoublingDistances(6, 64, both=False).dense(64)[63]
    assert row.nonzero()[:, 0].tolist() == [26, 42, 50, 54, *range(56, 64)]


def test_pairs_are_counted_at_lengths_that_nobody_could_write_out() -> None:
    length = 2**20
    powers = 20 * length - (length - 1)  # length - 2^m for each m < 20
    assert DoublingDistances(1, None, both=False).pairs(length) == length + powers
    assert DoublingDistances(1, None, both=True).pairs(length) == length + 2 * powers
    assert DoublingDistances(1, 1, both=False).pairs(length) == length * (length + 1) // 2


@BOTH_FORMS
@given(pattern=PATTERNS)
def test_everything_is_seen_where_the_distances_start_anew_at_once(causal: bool, pattern: DoublingDistances) -> None:
    everything = replace(pattern, restart=1, both=not causal).dense(9)
    assert everything.equal(Causal().dense(9) if causal else torch.ones(9, 9, dtype=torch.bool))


@BOTH_FORMS
@given(
    length=st.integers(1, 70),
    local=st.sampled_from([1, 2, 5]),
    restart=st.sampled_from([None, 7, 16]),
    data=st.data(),
)
@example(length=70, local=1, restart=None, data=None)
def test_it_equals_the_definition(
    causal: bool, length: int, local: int, restart: int | None, data: st.DataObject | None
) -> None:
    mixer = logsparse(causal=causal, local=local, restart=restart)
    mask = None if data is None else data.draw(masks(2, length))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize(("causal", "kernel"), [(False, 1), (False, 3), (False, 9), (True, 1), (True, 2), (True, 9)])
@given(length=st.integers(1, 30), data=st.data())
def test_a_convolution_equals_that_of_each_document_alone(
    positions: str, causal: bool, kernel: int, length: int, data: st.DataObject
) -> None:
    mixer = logsparse(causal=causal, kernel=kernel, positions=positions)
    mask = data.draw(masks(2, length))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@given(
    options=st.sampled_from(
        [{}, {"local": 3}, {"local": 2, "restart": 8}, {"kernel": 2}, {"kernel": 9, "positions": "rotary"}]
    ),
    pieces=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    data=st.data(),
)
def test_a_stream_equals_the_definition_over_the_whole(
    options: dict[str, Any], pieces: list[int], data: st.DataObject
) -> None:
    mixer, mask = logsparse(**options), data.draw(masks(2, sum(pieces)))
    x = torch.randn(2, sum(pieces), 4, dtype=torch.float64, requires_grad=True)

    assert_same_values_and_gradients(
        mixer, lambda: streamed(mixer, x, mask, pieces), lambda: definition(mixer, x, mask), [x]
    )


@BOTH_FORMS
def test_only_visible_tokens_and_those_under_their_kernels_get_a_gradient(causal: bool) -> None:
    kernel, length = 3, 30
    mixer = logsparse(causal=causal, kernel=kernel)
    x = torch.randn(1, length, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x).y, x)
    assert isinstance(jacobian, Tensor)
    reached = jacobian[0, :, :, 0].abs().amax(dim=(1, 3)) > 0
    under = [0, 1, 2] if causal else [-1, 0, 1]
    seen = dense(mixer.config.pattern(causal=causal), length)
    for i in range(length):
        keys = [j for j in range(length) if seen[i][j]]
        scored = keys if len(keys) > 1 else []  # the softmax of a single score is constant
        through = {j - step for j in scored for step in under if 0 <= j - step < length}
        assert set(reached[i].nonzero().flatten().tolist()) == through | set(keys)


@pytest.mark.parametrize("bias", [True, False])
@BOTH_FORMS
def test_a_convolution_is_priced_as_torch_counts_its_own(causal: bool, bias: bool) -> None:
    length, kernel = 17, 5
    dims = make_dims(embed_dim=6, num_heads=2, head_dim=5, causal=causal, bias=bias)
    plain, wide = (LogSparseConfig(kernel=width).cost(dims, length, 4) for width in (1, kernel))
    with FlopCounterMode(display=False) as counter:
        F.conv1d(torch.randn(1, 6, length), torch.randn(10, 6, kernel), padding="same")
    projection = 2 * length * 6 * 10
    assert wide.flops - plain.flops == 2 * (counter.get_total_flops() - projection)
    assert wide.parameters == sum(p.numel() for p in LogSparseConfig(kernel=kernel).build(dims).parameters())
    assert wide.activation_bytes == plain.activation_bytes


def test_a_state_holds_the_inputs_that_a_convolution_reaches() -> None:
    mixer, x = logsparse(causal=True, kernel=4), torch.randn(2, 9, 4, dtype=torch.float64)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 2:8] = False
    state = mixer(x, mask=Mask(valid), state=mixer.init_state(2)).state
    assert isinstance(state, ConvolutionCache)
    assert torch.equal(state.inputs, torch.stack((x[0, 6:], x[1, [0, 1, 8]])))


def test_a_convolution_begins_as_xavier_would_have_it() -> None:
    dims = make_dims(embed_dim=32, num_heads=4, causal=True)
    convolution, peer = Convolution(dims, 5), torch.empty(32, 32, 5)
    torch.nn.init.xavier_uniform_(peer)
    assert convolution.weight.abs().max().item() == pytest.approx(peer.abs().max().item(), rel=0.01)
    assert convolution.weight.std().item() == pytest.approx(peer.std().item(), rel=0.05)
    assert convolution.bias is not None
    assert not convolution.bias.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local": 0}, "logsparse: local counts the nearest keys, the token's own included; got 0"),
        ({"restart": 0}, "logsparse: restart counts the tokens of a range and must be at least 1, got 0"),
        ({"kernel": 0}, "logsparse: kernel counts the tokens that make a query, itself included; got 0"),
        ({"kernel": 4}, "centred on the token, so that kernel must be odd; got 4, use 3 or 5"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logsparse(causal=False, **options)
