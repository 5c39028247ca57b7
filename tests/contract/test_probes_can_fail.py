"""Each probe goes red on a mechanism that breaks its claim; a probe that can't fail proves nothing.

The broken mechanisms are dense attention with one thing wrong, each a defect that was found in some published code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from subquad.benchmark.probes import run_probes
from subquad.build import make_dims
from subquad.costs import Cost
from subquad.interface import Dims, Mixed, MixerConfig, TokenMixer, Traits
from subquad.layers.heads import Heads
from subquad.mask import Mask
from subquad.mechanisms.full import Full, FullConfig, KeyValueCache
from subquad.mechanisms.local import LocalConfig
from subquad.state import State

DIMS = make_dims(embed_dim=16, num_heads=2)


@dataclass(frozen=True, kw_only=True)
class Claiming(MixerConfig):
    """A mechanism that claims what dense attention can do, but for `claims`."""

    module: ClassVar[type[Full]] = Full
    claims: ClassVar[Mapping[str, bool]] = {}
    extra_parameters: ClassVar[int] = 0

    @property
    def traits(self) -> Traits:
        return replace(FullConfig().traits, **self.claims)

    def build(self, dims: Dims) -> TokenMixer:
        return self.module(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        return FullConfig().cost(dims, length, dtype_bytes) + Cost(parameters=self.extra_parameters)


class SeesTheFuture(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        out, new_state = super().attend(heads, state)
        return out + 1e-9 * heads.q.mean(dim=2, keepdim=True), new_state


class DependsOnTheLength(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        out, new_state = super().attend(heads, state)
        return out / heads.q.shape[2], new_state


class IgnoresPadding(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        return super().attend(heads._replace(mask=Mask(), key_mask=Mask()), state)


class IgnoresSegments(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        masks = (replace(mask, segments=None) for mask in (heads.mask, heads.key_mask))
        mask, key_mask = masks
        return super().attend(heads._replace(mask=mask, key_mask=key_mask), state)


class ReadsPadding(Full):
    def forward(self, x: Tensor, context: Tensor | None = None, **call: object) -> Mixed:  # pyright: ignore[reportIncompatibleMethodOverride] - the defect: it passes by the checks
        mixed = super().forward(x, context, **call)  # pyright: ignore[reportArgumentType] - handed on as it came
        return mixed._replace(y=mixed.y + x.mean(dim=1, keepdim=True))


class NormalisesOverTheBatch(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        out, new_state = super().attend(heads, state)
        return out / heads.q.abs().max(), new_state


class WritesIntoItsState(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        out, new_state = super().attend(heads, state)
        if state is not None:
            state.length.add_(1)
        return out, new_state


class CountsPadding(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        out, new_state = super().attend(heads, state)
        if isinstance(new_state, KeyValueCache) and state is not None:
            new_state = replace(new_state, length=state.length + heads.q.shape[2])
        return out, new_state


class RemembersRowsItself(Full):
    """Its state is the module's own, so that a reordered state has no effect."""

    remembered: Tensor | None = None

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        out, new_state = super().attend(heads, state)
        if isinstance(state, KeyValueCache):
            if not bool(state.length.any()):
                self.remembered = torch.zeros(out.shape[0], dtype=out.dtype)
            assert self.remembered is not None
            out = out + 0 * self.remembered[:, None, None, None] + torch.arange(len(out))[:, None, None, None]
        return out, new_state


class CutsTheGradient(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        assert heads.v is not None
        return super().attend(heads._replace(v=heads.v.detach()), state)


class Overflows(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        assert heads.k is not None
        assert heads.v is not None
        weights = (heads.q @ heads.k.mT).exp()
        return weights @ heads.v / weights.sum(dim=-1, keepdim=True), state


class RoundsItsSums(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        out, new_state = super().attend(heads, state)
        large = 1e3 * heads.q.square().sum(dim=-1, keepdim=True)
        return out + large - large.bfloat16().to(out.dtype), new_state


class KeepsANarrowState(Full):
    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return super().new_state(batch_size, device, torch.bfloat16)


class Draws(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        out, new_state = super().attend(heads, state)
        return out + 1e-6 * torch.randn_like(out), new_state


class ReadsMaxLength(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        out, new_state = super().attend(heads, state)
        return out * (self.dims.max_length or 1), new_state


class LosesInEvaluation(Full):
    def forward(self, *inputs: Tensor | None, **call: object) -> Mixed:  # pyright: ignore[reportIncompatibleMethodOverride] - handed on as it came
        return super().forward(*inputs, **call)._replace(aux_loss=torch.zeros(()))  # pyright: ignore[reportArgumentType] - handed on


class SkipsTheChecks(Full):
    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None, **rest: object) -> Mixed:  # pyright: ignore[reportIncompatibleMethodOverride] - the defect
        return self.mix(x, context, mask, None, None)


class Fails(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        raise RuntimeError("out of ideas\nand more")


BIDIRECTIONAL, CAUSAL, CROSS = DIMS, replace(DIMS, causal=True), replace(DIMS, cross=True)
BROKEN = [
    (SeesTheFuture, {}, CAUSAL, "no future leak"),
    (DependsOnTheLength, {}, CAUSAL, "prefix"),
    (DependsOnTheLength, {}, CAUSAL, "stream in pieces"),
    (IgnoresPadding, {}, BIDIRECTIONAL, "padded against unpadded"),
    (IgnoresPadding, {}, CROSS, "padded against unpadded"),
    (IgnoresSegments, {}, BIDIRECTIONAL, "packed documents"),
    (IgnoresSegments, {}, CAUSAL, "packed documents"),
    (IgnoresSegments, {}, CROSS, "packed documents"),
    (ReadsPadding, {}, BIDIRECTIONAL, "content of padding"),
    (ReadsPadding, {}, BIDIRECTIONAL, "output at padding"),
    (ReadsPadding, {}, BIDIRECTIONAL, "nothing but padding"),
    (NormalisesOverTheBatch, {}, BIDIRECTIONAL, "batch independence"),
    (WritesIntoItsState, {}, CAUSAL, "state not modified"),
    (CountsPadding, {}, CAUSAL, "stream in pieces"),
    (RemembersRowsItself, {}, CAUSAL, "rows of a state"),
    (Full, {"constant_state": True}, CAUSAL, "size of the state"),
    (CutsTheGradient, {}, BIDIRECTIONAL, "gradients"),
    (Overflows, {}, BIDIRECTIONAL, "extreme inputs"),
    (RoundsItsSums, {}, CAUSAL, "dtypes"),
    (KeepsANarrowState, {}, CAUSAL, "dtypes"),
    (Draws, {}, BIDIRECTIONAL, "determinism"),
    (ReadsMaxLength, {}, replace(DIMS, max_length=50), "longest input"),
    (LosesInEvaluation, {}, BIDIRECTIONAL, "auxiliary loss"),
    (Full, {"aux_loss": True}, BIDIRECTIONAL, "auxiliary loss"),
    (Full, {"approximates_softmax": False}, BIDIRECTIONAL, "approximates softmax"),
    (SkipsTheChecks, {"segments": False}, BIDIRECTIONAL, "refusals"),
]


def red_probes(config: MixerConfig, dims: Dims) -> dict[str, str]:
    return {result.name: result.detail for result in run_probes(config, dims) if not result.passed}


def config_of(module: type[Full], claims: Mapping[str, bool], *, extra_parameters: int = 0) -> MixerConfig:
    fields = {"module": module, "claims": claims, "extra_parameters": extra_parameters}
    return type(f"{module.__name__}Config", (Claiming,), fields)()


@pytest.mark.parametrize("dims", [BIDIRECTIONAL, CAUSAL, CROSS], ids=["bidirectional", "causal", "cross"])
def test_the_unbroken_mechanism_is_green_without_being_registered(dims: Dims) -> None:
    assert not red_probes(config_of(Full, {}), dims)


@pytest.mark.parametrize(
    ("module", "claims", "dims", "probe"), BROKEN, ids=[f"{m.__name__}-{p}" for m, _, _, p in BROKEN]
)
def test_the_probe_goes_red(module: type[Full], claims: Mapping[str, bool], dims: Dims, probe: str) -> None:
    assert probe in red_probes(config_of(module, claims), dims)


def test_a_wrong_parameter_count_goes_red() -> None:
    assert red_probes(config_of(Full, {}, extra_parameters=1), DIMS) == {
        "parameter count": "288 parameters, the cost says 289"
    }


class Overclaiming(LocalConfig):
    """A window that says that it sees everything."""

    @property
    def traits(self) -> Traits:
        return replace(super().traits, global_tokens=True, approximates_softmax=True)


def test_a_window_that_claims_to_be_global_and_softmax_goes_red() -> None:
    red = red_probes(Overclaiming(), DIMS)
    assert red.keys() == {"global tokens", "approximates softmax"}
    assert red["global tokens"] == "a global token sees 5 and is seen by 5 of 37 tokens"
    assert "limit 0.5" in red["approximates softmax"]


def test_a_mechanism_that_raises_is_a_finding_and_no_crash() -> None:
    (result,) = run_probes(config_of(Fails, {}), DIMS)
    assert not result.passed
    assert result.detail == "RuntimeError: out of ideas"


def test_a_form_that_is_not_offered_is_a_finding_and_no_crash() -> None:
    (result,) = run_probes(config_of(Full, {"causal": False}), CAUSAL)
    assert not result.passed
    assert "causal=True is not supported" in result.detail


def test_structure_over_the_padded_length_is_described_when_declared() -> None:
    declared = type("Declared", (Claiming,), {"module": IgnoresPadding, "padded_structure": "blocks"})()
    details = {result.name: result for result in run_probes(declared, DIMS)}
    assert details["padded against unpadded"].passed
    assert "laid over the padded length: blocks" in details["padded against unpadded"].detail
