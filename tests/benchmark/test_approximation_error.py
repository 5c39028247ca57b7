"""Errors against softmax attention: exact where they are known, and refusals."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from subquad.benchmark.approximation_error import (
    Qkv,
    approximation_errors,
    knobs,
    random_qkv,
    read_qkv,
)
from subquad.build import list_mixers, make_dims, mixer_config
from subquad.costs import Cost
from subquad.interface import Dims, MixerConfig, TokenMixer, Traits
from subquad.layers.heads import Heads
from subquad.mechanisms.full import Full, FullConfig
from subquad.ops.softmax import softmax_attention
from subquad.registry import register
from subquad.state import State


@dataclass(frozen=True, kw_only=True)
class ShrunkConfig(MixerConfig):
    """Dense attention, too small by a known factor; the first head by twice as much."""

    family: ClassVar[str] = "dense"
    steps: int = 4
    """The factor is 1 - 1 / steps."""
    seed: int = 3
    """Without effect."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps > 8:
            raise ValueError("shrunk: steps must be at most 8")

    @property
    def traits(self) -> Traits:
        return replace(FullConfig().traits, state=False)

    def build(self, dims: Dims) -> TokenMixer:
        return Shrunk(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        return Cost(flops=self.steps * length)


class Shrunk(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        assert isinstance(self.config, ShrunkConfig)
        out, _ = super().attend(heads, state)
        factors = torch.full((out.shape[1], 1, 1), 1 / self.config.steps)
        factors[0] *= 2
        return out * (1 - factors), None


@pytest.fixture
def shrunk() -> MixerConfig:
    register("shrunk")(ShrunkConfig)
    return mixer_config("shrunk")


@pytest.mark.parametrize("causal", [False, True])
def test_a_known_error_is_found_for_every_value_of_the_option_that_costs(shrunk: MixerConfig, causal: bool) -> None:
    points = approximation_errors(shrunk, [random_qkv(20, num_heads=4, head_dim=8, scale=1.0)], causal=causal)
    assert [point.options for point in points] == [{"steps": 2}, {"steps": 4}, {"steps": 8}]
    for point in points:
        share = 1 / point.options["steps"]
        assert point.mean == pytest.approx(share * 5 / 4, rel=1e-5)
        assert point.worst == pytest.approx(2 * share, rel=1e-5)
        assert (point.source, point.length) == ("N(0, 1²)", 20)


@pytest.mark.parametrize("causal", [False, True])
def test_dense_attention_has_no_error_and_averaging_the_one_of_its_definition(causal: bool) -> None:
    given = random_qkv(12, num_heads=2, head_dim=4, scale=1.5, examples=3)
    (point,) = approximation_errors(mixer_config("full"), [given], causal=causal)
    visible = torch.ones(12, 12, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    exact, mean = (softmax_attention(q, given.k, given.v, visible) for q in (given.q, torch.zeros_like(given.q)))
    expected = ((mean - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)).mean()
    assert point.mean < 1e-5
    assert point.options == {}
    assert point.averaging == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", list_mixers(approximates_softmax=True))
def test_every_approximation_is_measured_and_is_closer_than_averaging_on_gentle_input(name: str) -> None:
    config = mixer_config(name)
    given = random_qkv(64, num_heads=2, head_dim=16, scale=0.5)
    points = approximation_errors(config, [given], causal=not config.traits.bidirectional)
    assert all(math.isfinite(point.worst) and point.worst >= point.mean >= 0 for point in points)
    asked = [point for point in points if all(value == getattr(config, name) for name, value in point.options.items())]
    assert asked
    assert all(point.mean < 2 * point.averaging for point in asked)


@pytest.mark.parametrize(
    ("name", "options", "turned", "values"),
    [
        ("performer", {}, "features", [16, 1024]),
        ("nystromformer", {"iterations": 12}, "landmarks", [4, 56]),
        ("reformer", {"chunk": 8}, "rounds", [1, 16]),
        ("reformer", {"chunk": 8, "dedup": True}, "rounds", [1, 16]),
        ("linformer", {"compression": "mean"}, "rank", [32, 64]),
        ("combiner", {}, "block", [16, 64]),
        ("topk", {}, "top_k", [4, 48]),
    ],
)
def test_what_costs_more_is_closer(name: str, options: dict[str, object], turned: str, values: list[int]) -> None:
    given = random_qkv(64, num_heads=4, head_dim=16, scale=0.5, examples=4)
    config = mixer_config(name, **options)
    little, much = approximation_errors(config, [given], sweeps={turned: values}, causal=False)
    assert much.mean < 0.5 * little.mean < math.inf


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("reformer", {"chunk": 20}),
        ("nystromformer", {"landmarks": 20}),
        ("linformer", {"compression": "mean", "rank": 20}),
        ("combiner", {"block": 20}),
        ("topk", {"top_k": 20}),
    ],
)
def test_what_leaves_nothing_out_has_no_error(name: str, options: dict[str, int]) -> None:
    given = random_qkv(20, num_heads=2, head_dim=8, scale=0.5)
    (point,) = approximation_errors(mixer_config(name, **options), [given], sweeps={}, causal=False)
    assert point.worst < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_reformer_is_held_against_attention_to_all_other_tokens_with_queries_for_keys(causal: bool) -> None:
    given = random_qkv(12, num_heads=2, head_dim=4, scale=1.5, examples=3)
    others = ~torch.eye(12, dtype=torch.bool)
    others = others.tril() if causal else others
    others[0, 0] = causal  # the one token that sees nothing else
    scores = given.q @ (given.q / given.q.norm(dim=-1, keepdim=True)).mT
    weights = scores.masked_fill(~others, -math.inf).softmax(dim=-1)
    exact, mean = weights @ given.v, (others / others.sum(dim=-1, keepdim=True)) @ given.v
    config = mixer_config("reformer", chunks="bucket", buckets=1, chunk=12)
    (point,) = approximation_errors(config, [given], sweeps={}, causal=causal)
    expected = ((mean - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)).mean()
    assert point.averaging == pytest.approx(float(expected), rel=1e-4)
    assert point.worst < 1e-5
    assert "k isn't read" in point.note


def test_a_shared_projection_of_routing_is_held_against_one_cluster() -> None:
    given = random_qkv(12, num_heads=2, head_dim=4, scale=0.5)
    config = mixer_config("routing", clusters=1, epsilon=0.0)
    (point,) = approximation_errors(config, [given], sweeps={}, causal=True)
    assert point.worst < 1e-5 < point.averaging


def test_the_convolution_of_nystromformer_is_left_out() -> None:
    given = random_qkv(20, num_heads=2, head_dim=8, scale=0.5)
    whole, bare = (
        approximation_errors(mixer_config("nystromformer", landmarks=8, **options), [given], causal=False)
        for options in ({}, {"kernel": 0})
    )
    assert [replace(point, note="") for point in whole] == bare
    assert all("kernel=0" in point.note for point in whole)
    with pytest.raises(ValueError, match=r"nystromformer: kernel is no part of attention.* \(kernel=0\)"):
        approximation_errors(mixer_config("nystromformer"), [given], sweeps={"kernel": [3]}, causal=False)


RANDOM: list[tuple[str, dict[str, Any], bool]] = [
    ("linformer", {}, False),
    ("linformer", {"compression": "convolution"}, False),
    ("sinkhorn", {}, False),
    ("combiner", {"plan": "rowmajor"}, True),
    ("combiner", {"plan": "rowmajor", "row_summary": "wsum_proj"}, False),
    ("combiner", {"activation": "deepset"}, True),
    ("delta", {}, True),
    ("delta", {"kernel": 0, "gated": True}, True),
]


@pytest.mark.parametrize(("name", "options", "causal"), RANDOM, ids=str)
def test_what_is_random_until_it_is_trained_is_said(name: str, options: dict[str, Any], causal: bool) -> None:
    given = random_qkv(20, num_heads=2, head_dim=8, scale=0.5)
    (point,) = approximation_errors(mixer_config(name, **options), [given], sweeps={}, causal=causal)
    assert "random until it is trained" in point.note


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linformer", {"compression": "mean"}),
        ("combiner", {}),
        ("combiner", {"activation": "relu"}),
        ("combiner", {"plan": "rowmajor", "row_summary": "wsum"}),
    ],
    ids=str,
)
def test_where_nothing_is_random_nothing_is_said(name: str, options: dict[str, Any]) -> None:
    given = random_qkv(20, num_heads=2, head_dim=8, scale=0.5)
    (point,) = approximation_errors(mixer_config(name, **options), [given], sweeps={}, causal=False)
    assert point.note == ""


def test_an_option_to_turn_is_a_whole_number_that_costs(shrunk: MixerConfig) -> None:
    dims = make_dims(embed_dim=16, num_heads=2)
    assert knobs(shrunk, dims, 10) == {"steps": (2, 4, 8)}
    assert knobs(replace(shrunk, steps=1), dims, 10) == {"steps": (1, 2)}
    assert knobs(mixer_config("performer", features=6), dims, 10) == {"features": (3, 6, 12)}
    assert knobs(mixer_config("full"), dims, 10) == {}


def test_an_option_that_can_not_be_doubled_is_not_turned(shrunk: MixerConfig) -> None:
    assert knobs(replace(shrunk, steps=5), make_dims(embed_dim=16, num_heads=2), 10) == {}


def test_a_window_that_holds_all_tokens_has_no_error() -> None:
    given = random_qkv(20, num_heads=2, head_dim=8, scale=0.5)
    narrow, whole = approximation_errors(mixer_config("local"), [given], sweeps={"window": [5, 39]}, causal=False)
    assert whole.mean < 1e-5 < 0.1 < narrow.mean


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gmlp", "it is a whole block"), ("gated_linear", r"it doesn't project into heads .* \(project_query\)")],
)
def test_what_is_no_attention_over_queries_and_keys_is_refused(name: str, reason: str) -> None:
    given = random_qkv(8, num_heads=2, head_dim=4, scale=0.5)
    with pytest.raises(ValueError, match=f"{name}: its error can't be measured, since {reason}"):
        approximation_errors(mixer_config(name), [given], causal=not mixer_config(name).traits.bidirectional)


def test_a_form_that_is_not_offered_is_refused() -> None:
    with pytest.raises(ValueError, match="nystromformer: causal=True is not supported"):
        approximation_errors(
            mixer_config("nystromformer", kernel=0), [random_qkv(4, num_heads=1, head_dim=4, scale=1.0)], causal=True
        )


def write(path: Path, **tensors: Tensor) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (3, 5, 4)])
def test_given_tensors_are_read(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    q, k, v = torch.randn(3, *shape).to(dtype)
    given = read_qkv(write(tmp_path / "mine.safetensors", q=q, k=k, v=v, other=torch.ones(1)))
    for found, expected in zip(given[:3], (q, k, v), strict=True):
        assert torch.equal(found, expected.float() if len(shape) == 4 else expected.float()[None])
    assert given.source == "mine.safetensors"
    assert given.first(2).q.shape[2] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": None}, "expected tensors q, k and v, but k is missing; it holds q, v"),
        ({"k": torch.ones(1, 2, 6, 4)}, r"q, k and v must have one shape, got \(1, 2, 5, 4\) and \(1, 2, 6, 4\)"),
        ({"q": torch.ones(5, 4)}, r"q must have shape \(B, H, L, E\) or \(H, L, E\), got \(5, 4\)"),
        ({"v": torch.ones(1, 2, 5, 4, dtype=torch.int64)}, "v must be floating point, got torch.int64"),
        ({"v": torch.full((1, 2, 5, 4), math.nan)}, "v holds numbers that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changes: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    tensors = {name: torch.ones(1, 2, 5, 4) for name in "qkv"} | changes
    path = write(tmp_path / "mine.safetensors", **{name: each for name, each in tensors.items() if each is not None})
    with pytest.raises(ValueError, match=rf"mine\.safetensors: {message}"):
        read_qkv(path)


@pytest.mark.parametrize("content", [b"", b"not tensors at all", b"\x80\x04N."])
def test_another_kind_of_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"mine\.pt: not a safetensors file"):
        read_qkv(path)


def test_random_input_is_the_same_every_time() -> None:
    first, second = (random_qkv(5, num_heads=2, head_dim=3, scale=0.5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    assert isinstance(first, Qkv)
