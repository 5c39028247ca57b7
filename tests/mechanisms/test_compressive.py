"""The Compressive Transformer equals its paper token by token; what trains what; a stream in pieces is the stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import assert_same_values_and_gradients, disturbed, masks
from compressive_by_segments import by_segments
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad import Mask, receipts
from subquad.build import build_mixer, make_dims
from subquad.layers.compressive_stream import CompressiveState
from subquad.mechanisms.compressive import Compressive, CompressiveConfig

COMPRESSIONS = ("max", "mean", "convolution", "dilated", "most_used")
PIECES = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@st.composite
def options(draw: st.DrawFn, *, segments: bool | None = None) -> dict[str, Any]:
    """Sizes so small that memories overflow, and any form."""
    compression = draw(st.sampled_from(COMPRESSIONS))
    learns = compression in ("convolution", "dilated")
    cut = draw(st.booleans()) if segments is None else segments
    return {
        "compression": compression,
        "rate": draw(st.sampled_from([1, 2, 3])),
        "overlap": 0 if compression == "most_used" else draw(st.sampled_from([0, 1])),
        "dilations": draw(st.sampled_from([(1,), (1, 2)])),
        "remainder": draw(st.sampled_from(["drop", "carry"])),
        "loss": draw(st.sampled_from([None, "attention", "autoencoding", *["bptt"] * cut])) if learns else None,
        "cm_positions": draw(st.sampled_from(["official", "true"])),
        "memory_length": draw(st.sampled_from([0, 2, 5])),
        "compressed_length": draw(st.sampled_from([0, 1, 3, 20])),
        "segment_length": draw(st.sampled_from([1, 3, 4, 7])) if cut else None,
        "zero_memory": draw(st.booleans()),
    }


def compressive(**given_options: Any) -> Compressive:
    dims = make_dims(embed_dim=4, num_heads=2, causal=True)
    mixer = disturbed(Compressive(CompressiveConfig(**given_options), dims))
    assert isinstance(mixer, Compressive)
    return mixer


def streamed(
    mixer: Compressive, x: Tensor, calls: list[int], mask: Mask | None = None
) -> tuple[Tensor, Any, list[Tensor]]:
    """Outputs of all calls, the last state, and the losses of each."""
    state, outputs, losses, start = mixer.init_state(x.shape[0]), [], [], 0
    for size in calls:
        cut = slice(start, start + size)
        valid = None if mask is None or mask.valid is None else mask.valid[:, cut]
        y, state, loss = mixer(x[:, cut], mask=None if valid is None else Mask(valid), state=state)
        outputs.append(y)
        losses += [] if loss is None else [loss]
        start += size
    return torch.cat(outputs, dim=1), state, losses


def stream_of(length: int) -> Tensor:
    return torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)


@given(length=st.sampled_from([1, 5, 11, 23]), chosen=options(segments=True), data=st.data())
def test_it_equals_the_paper(length: int, chosen: dict[str, Any], data: st.DataObject) -> None:
    mixer, x, mask = compressive(**chosen), stream_of(length), data.draw(masks(2, length, segments=False))
    expected = by_segments(mixer, x, mask, [length], state=False)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: expected.y, [x])


@given(pieces=PIECES, chosen=options(), data=st.data())
def test_a_stream_in_calls_equals_the_paper(pieces: list[int], chosen: dict[str, Any], data: st.DataObject) -> None:
    mixer, x, mask = compressive(**chosen), stream_of(sum(pieces)), data.draw(masks(2, sum(pieces), segments=False))
    expected = by_segments(mixer, x, mask, pieces, state=True)
    assert_same_values_and_gradients(mixer, lambda: streamed(mixer, x, pieces, mask)[0], lambda: expected.y, [x])


@given(pieces=PIECES, chosen=options(), data=st.data())
def test_the_state_holds_the_memories_of_the_paper(
    pieces: list[int], chosen: dict[str, Any], data: st.DataObject
) -> None:
    mixer, x, mask = compressive(**chosen), stream_of(sum(pieces)), data.draw(masks(2, sum(pieces), segments=False))
    expected, state = by_segments(mixer, x, mask, pieces, state=True), streamed(mixer, x, pieces, mask)[1]
    for b in range(2):
        stored = state.hidden[b, state.hidden.shape[1] - int(state.length[b] - state.memory_start[b]) :]
        torch.testing.assert_close(list(stored), expected.memories[b], rtol=1e-12, atol=1e-12)
        wanted = expected.rows[b][len(expected.rows[b]) - min(len(expected.rows[b]), chosen["compressed_length"]) :]
        kept = state.compressed[b, state.compressed.shape[1] - int(state.rows[b]) :]
        torch.testing.assert_close(list(kept), wanted, rtol=1e-12, atol=1e-12)


@given(pieces=PIECES, chosen=options(segments=True), data=st.data())
def test_any_partition_of_a_stream_gives_the_same(
    pieces: list[int], chosen: dict[str, Any], data: st.DataObject
) -> None:
    mixer, length = compressive(**chosen), sum(pieces)
    x, mask = stream_of(length), data.draw(masks(2, length, segments=False))
    assert_same_values_and_gradients(
        mixer, lambda: streamed(mixer, x, pieces, mask)[0], lambda: mixer(x, mask=mask).y, [x]
    )


@given(length=st.sampled_from([1, 5, 11, 23]), chosen=options(segments=True), data=st.data())
def test_the_auxiliary_loss_is_that_of_the_paper(length: int, chosen: dict[str, Any], data: st.DataObject) -> None:
    mixer, x, mask = (
        compressive(**chosen, loss_weight=3.0),
        stream_of(length),
        data.draw(masks(2, length, segments=False)),
    )
    told, found = by_segments(mixer, x, mask, [length], state=False), mixer(x, mask=mask).aux_loss
    if not mixer.config.traits.aux_loss:
        assert found is None
        return
    assert found is not None
    assert found.dtype == torch.float32
    if not told.squares:
        assert found == 0
        return
    expected, leaves = 3 * torch.cat(told.squares).mean(), [x, *mixer.parameters()]
    torch.testing.assert_close(found, expected.float())
    gradients = [
        torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True) for loss in (found, expected)
    ]
    for gradient, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10)


@given(pieces=PIECES, chosen=options())
def test_the_loss_of_a_call_is_that_of_the_segments_that_end_in_it(pieces: list[int], chosen: dict[str, Any]) -> None:
    mixer, x = compressive(**chosen), stream_of(sum(pieces))[:1].detach()
    losses, known = streamed(mixer, x, pieces)[2], 0
    for index, loss in enumerate(losses):
        told = by_segments(mixer, x[:, : sum(pieces[: index + 1])], None, pieces[: index + 1], state=True).squares
        of_call = told[known:]
        known = len(told)
        torch.testing.assert_close(loss, torch.cat(of_call).mean().float() if of_call else torch.zeros(()))


@pytest.mark.parametrize(("kind", "learn"), [("attention", {"compress"}), ("autoencoding", {"compress", "decode"})])
@pytest.mark.parametrize("compression", ["convolution", "dilated"])
def test_the_auxiliary_loss_teaches_the_compression_alone(compression: str, kind: str, learn: set[str]) -> None:
    mixer = compressive(compression=compression, loss=kind, rate=2, dilations=(1,), memory_length=3, segment_length=4)
    x = stream_of(17)
    loss = mixer(x).aux_loss
    assert loss is not None
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)
    assert gradients[0] is None
    taught = {name.split(".")[0] for name, gradient in zip(names, gradients[1:], strict=True) if gradient is not None}
    assert taught == learn
    assert all(gradient.abs().max() > 0 for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("kind", ["attention", "autoencoding"])
def test_a_disturbance_of_the_compression_moves_the_loss_by_its_gradient(kind: str) -> None:
    mixer, x = compressive(loss=kind, rate=2, memory_length=3, segment_length=4), stream_of(17).detach()
    weight = mixer.compress.get_parameter("weight")
    loss = mixer(x).aux_loss
    assert loss is not None
    (gradient,) = torch.autograd.grad(loss, weight)
    step, losses = torch.randn_like(weight), []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 0.01 * step
            told = by_segments(mixer, x, None, [17], state=False)
            losses.append(torch.cat(told.squares).mean())
            weight -= sign * 0.01 * step
    torch.testing.assert_close((losses[0] - losses[1]) / 0.02, (gradient * step).sum(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("loss", "told"), [("attention", False), ("autoencoding", False), ("bptt", True)])
@pytest.mark.parametrize("in_calls", [False, True])
def test_the_loss_of_the_model_reaches_the_compression_with_bptt_alone(loss: str, told: bool, in_calls: bool) -> None:
    mixer, x = compressive(loss=loss, rate=2, memory_length=3, segment_length=4), stream_of(12)
    weight = mixer.compress.get_parameter("weight")
    y = streamed(mixer, x, [5, 3, 4])[0] if in_calls else mixer(x).y
    (within,) = torch.autograd.grad(y[:, :8].sum(), weight, allow_unused=True, retain_graph=True)
    (beyond,) = torch.autograd.grad(y[:, 8:].sum(), weight, allow_unused=True)
    assert within is None or not within.any()  # two segments that no row precedes
    assert (beyond is not None and bool(beyond.any())) == told


@pytest.mark.parametrize("loss", ["attention", "bptt"])
def test_no_gradient_reaches_a_token_through_a_later_segment(loss: str) -> None:
    mixer, x = compressive(loss=loss, rate=2, memory_length=3, segment_length=4), stream_of(15)
    (gradient,) = torch.autograd.grad(mixer(x).y[0, 14].square().sum(), x)
    assert gradient[0].abs().sum(dim=1).nonzero()[:, 0].tolist() == [12, 13, 14]


@given(pieces=PIECES, cut=st.sampled_from([None, 3]), zeros=st.booleans())
def test_without_rows_it_is_transformer_xl(pieces: list[int], cut: int | None, zeros: bool) -> None:
    shared: dict[str, Any] = {"memory_length": 4, "segment_length": cut, "zero_memory": zeros}
    mixer = compressive(compressed_length=0, rate=2, **shared)
    peer = build_mixer("transformer_xl", embed_dim=4, num_heads=2, causal=True, **shared).double()
    own = mixer.state_dict()
    peer.load_state_dict({name: own[name] for name in peer.state_dict()})
    x = stream_of(sum(pieces))
    assert_equal_streams(mixer, peer, x, pieces)


@given(pieces=PIECES, cut=st.sampled_from([None, 1, 3]), compression=st.sampled_from(["mean", "max", "most_used"]))
def test_rows_that_are_tokens_at_true_distances_make_a_longer_memory(
    pieces: list[int], cut: int | None, compression: str
) -> None:
    mixer = compressive(
        compression=compression, rate=1, cm_positions="true", memory_length=3, compressed_length=4, segment_length=cut
    )
    peer = build_mixer(
        "transformer_xl", embed_dim=4, num_heads=2, causal=True, memory_length=7, segment_length=cut
    ).double()
    peer.load_state_dict(mixer.state_dict())
    assert_equal_streams(mixer, peer, stream_of(sum(pieces)), pieces)


def assert_equal_streams(mixer: Compressive, peer: Any, x: Tensor, pieces: list[int]) -> None:
    names = [name for name, _ in peer.named_parameters()]
    results = []
    for module in (mixer, peer):
        leaves = [x, *(module.get_parameter(name) for name in names)]
        y = streamed(module, x, pieces)[0]
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        results.append((y, *torch.autograd.grad((y * weights).sum(), leaves)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_zeros_compress_to_zeros_and_the_first_loss_is_zero() -> None:
    mixer = compressive(rate=2, memory_length=4, compressed_length=2, zero_memory=True)
    with torch.no_grad():
        for layer in (mixer.project_key, mixer.project_value):
            layer.bias.zero_()
    x = stream_of(8)
    _, state, loss = mixer(x[:, :4], state=mixer.init_state(2))
    assert isinstance(state, CompressiveState)
    assert not state.compressed.any()
    assert loss == 0
    _, state, loss = mixer(x[:, 4:], state=state)
    assert isinstance(state, CompressiveState)
    assert bool(state.compressed.any())
    assert loss is not None
    assert loss > 0


def test_attended_zeros_take_their_share() -> None:
    for zero_memory, share in ((True, 8.0), (False, 1.0)):
        mixer = compressive(memory_length=4, compressed_length=3, zero_memory=zero_memory)
        with torch.no_grad():
            for name, parameter in mixer.named_parameters():
                if not name.startswith(("project_value.weight", "project_out.weight")):
                    parameter.zero_()
        x = stream_of(1)
        expected = x @ mixer.project_value.weight.T @ mixer.project_out.weight.T / share
        torch.testing.assert_close(mixer(x).y, expected, rtol=1e-10, atol=1e-10)


def test_the_reach_is_that_of_both_memories() -> None:
    """Memory of 3 tokens, one that waits for a second one and isn't seen, 2 rows of 2 tokens, and nothing older."""
    mixer = compressive(rate=2, memory_length=3, compressed_length=2, segment_length=4, remainder="carry").eval()
    x = stream_of(24).detach()
    y = mixer(x).y
    for token, moves in ((19, True), (17, True), (16, False), (15, True), (12, True), (11, False), (3, False)):
        changed = x.clone()
        changed[:, token] += 1
        moved = (mixer(changed).y[:, 20] - y[:, 20]).abs().max() > 0
        assert bool(moved) == moves, token


def test_memories_may_be_longer_in_evaluation() -> None:
    sizes: dict[str, Any] = {"rate": 2, "segment_length": 4}
    mixer = compressive(**sizes, memory_length=2, compressed_length=1, eval_memory_length=5, eval_compressed_length=4)
    longer = compressive(**sizes, memory_length=5, compressed_length=4)
    longer.load_state_dict(mixer.state_dict())
    x = stream_of(23).detach()
    assert not torch.allclose(mixer(x).y, longer(x).y)
    assert torch.equal(mixer.eval()(x).y, longer.eval()(x).y)
    state = streamed(mixer.train(), x[:, :13], [13])[1]
    y, state, _ = mixer.eval()(x[:, 13:], state=state)  # a stream goes on with the memory that it has
    assert bool(y.isfinite().all())
    assert state.length.tolist() == [23, 23]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("segment_length", [None, 4])
def test_the_state_keeps_its_size_and_its_rows_can_be_chosen(compression: str, segment_length: int | None) -> None:
    mixer = compressive(
        compression=compression,
        dilations=(1,),
        rate=2,
        memory_length=3,
        compressed_length=2,
        segment_length=segment_length,
    ).eval()
    x = torch.randn(3, 17, 4, dtype=torch.float64)
    state = streamed(mixer, x[:, :10], [1, 6, 3])[1]
    assert state.nbytes == mixer.init_state(3).nbytes
    expected = mixer(x[:, 10:], state=state).y
    beams = torch.tensor([2, 0, 0, 1])
    torch.testing.assert_close(mixer(x[beams, 10:], state=state.index_select(beams)).y, expected[beams])


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_an_empty_batch_has_an_empty_stream(compression: str) -> None:
    mixer = compressive(compression=compression, dilations=(1,), rate=2, memory_length=3, segment_length=4)
    y, state, _ = streamed(mixer, torch.zeros(0, 13, 4, dtype=torch.float64), [6, 7])
    assert y.shape == (0, 13, 4)
    assert state.compressed.shape == (0, 512, 4)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_narrow_numbers_and_autocast_stay_close(compression: str) -> None:
    mixer = compressive(compression=compression, dilations=(1,), rate=2, memory_length=3, segment_length=4).float()
    x = torch.randn(2, 21, 4)
    exact = mixer(x).y.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state, loss = mixer(x, state=mixer.init_state(2))
    assert state.compressed.dtype == torch.float32
    assert (y.detach() - exact).norm() < 0.03 * exact.norm()
    (y.sum() if loss is None else y.sum() + loss).backward()
    assert all(bool(p.grad.isfinite().all()) for p in mixer.parameters() if p.grad is not None)
    y = mixer.bfloat16()(x.bfloat16()).y
    assert y.dtype == torch.bfloat16
    assert (y.detach().float() - exact).norm() < 0.03 * exact.norm()


def test_no_graph_grows_from_segment_to_segment() -> None:
    mixer = compressive(rate=2, memory_length=3, segment_length=4)
    state = streamed(mixer, stream_of(12), [12])[1]
    assert not state.compressed.requires_grad
    assert not streamed(compressive(rate=2, memory_length=3), stream_of(12), [12])[1].hidden.requires_grad
    mixer = compressive(rate=2, memory_length=3, segment_length=4, loss="bptt")
    assert streamed(mixer, stream_of(12), [12])[1].compressed.requires_grad


@pytest.mark.parametrize(("segment_length", "taught"), [(4, True), (8, False)])
def test_steps_of_a_stream_teach_the_compression_by_the_loss_of_the_model_or_leave_a_receipt(
    segment_length: int, taught: bool
) -> None:
    mixer = compressive(rate=2, memory_length=3, segment_length=segment_length, loss="bptt")
    state = mixer.init_state(2)
    with receipts() as left:
        for _ in range(4):
            y, state, _ = mixer(stream_of(8), state=state)
            y.sum().backward()
            state = state.detach()
    gradient = mixer.compress.get_parameter("weight").grad
    assert (gradient is not None and bool(gradient.any())) == taught
    assert [(entry.asked, entry.count) for entry in left.entries] == (
        [] if taught else [("loss='bptt'", 3)]
    )  # before that, no rows


def test_there_is_no_auxiliary_loss_in_evaluation() -> None:
    mixer, x = compressive(rate=2, memory_length=3, segment_length=4), stream_of(12)
    assert mixer(x).aux_loss is not None
    assert mixer.eval()(x).aux_loss is None


@pytest.mark.parametrize("compression", ["convolution", "dilated"])
def test_a_factor_of_the_loss_changes_no_direction(compression: str) -> None:
    gradients = []
    for factor in (1.0, 7.0):
        torch.manual_seed(0)
        mixer = compressive(
            compression=compression, dilations=(1,), rate=2, memory_length=3, segment_length=4, loss_weight=factor
        )
        mixed = mixer(stream_of(12))
        assert mixed.aux_loss is not None
        (mixed.y.sum() + mixed.aux_loss).backward()
        gradients.append({name: parameter.grad for name, parameter in mixer.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        factor = 7.0 if name.startswith("compress") else 1.0
        torch.testing.assert_close(gradients[1][name], factor * gradient)


def test_what_layers_share_are_the_biases() -> None:
    assert compressive().shared_parameters() == ("content_bias", "position_bias", "row_position_bias")
    assert compressive(cm_positions="true").shared_parameters() == ("content_bias", "position_bias")
    assert compressive(share_biases=False).shared_parameters() == ()


@pytest.mark.parametrize(
    ("given_options", "message"),
    [
        ({"rate": 0}, "compressive: rate must be at least 1, got 0"),
        ({"overlap": -1}, "compressive: overlap must be at least 0, got -1"),
        ({"memory_length": -1}, "compressive: memory_length must be at least 0, got -1"),
        ({"compressed_length": -1}, "compressive: compressed_length must be at least 0, got -1"),
        ({"eval_compressed_length": -2}, "compressive: eval_compressed_length must be at least 0, got -2"),
        ({"segment_length": 0}, "compressive: segment_length must be at least 1, got 0"),
        ({"loss_weight": -1.0}, r"compressive: loss_weight must be at least 0, got -1\.0"),
        ({"dilations": [1, 0]}, r"compressive: dilations must be at least 1, got \[1, 0\]"),
        ({"compression": "most_used", "overlap": 1}, "most_used has no windows, so overlap must be 0, got 1"),
        (
            {"compression": "mean", "loss": "attention"},
            "compression='mean' has no parameters that loss='attention' could",
        ),
        ({"loss": "bptt"}, "loss='bptt' needs segment_length, at most half of a training sequence"),
    ],
)
def test_what_makes_no_sense_is_refused(given_options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer("compressive", embed_dim=8, num_heads=2, causal=True, **given_options)


@pytest.mark.parametrize(("segment_length", "length", "reason"), [(None, 20, "is one segment"), (3, 6, "ended before")])
def test_a_call_that_compressed_nothing_says_so_once(segment_length: int | None, length: int, reason: str) -> None:
    mixer = compressive(memory_length=4, compressed_length=5, rate=2, segment_length=segment_length)
    x = torch.randn(2, length, 4, dtype=torch.float64)
    with receipts() as collected:
        mixer(x)
        mixer(x[:, :-1])
    (receipt,) = collected.entries
    assert (receipt.where, receipt.asked, receipt.ran) == ("compressive", "compressed memory", "nothing compressed")
    assert (reason in receipt.reason, receipt.count) == (True, 2)


def test_a_call_that_compressed_or_carries_a_state_or_has_no_rows_leaves_no_receipt() -> None:
    x = torch.randn(2, 20, 4, dtype=torch.float64)
    with receipts() as collected:
        compressive(memory_length=4, compressed_length=5, rate=2, segment_length=3)(x)
        compressive(memory_length=4, compressed_length=0, rate=2)(x)
        mixer = compressive(memory_length=4, compressed_length=5, rate=2)
        mixer(x, state=mixer.init_state(2))
    assert not collected.entries
