"""What a mechanism can't do it refuses with an error that names those that can; nothing is silently ignored."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from cases import WIDE_HEADS, small_config

from subquad import Mask, receipts
from subquad.build import build_from_config, list_mixers, make_dims, mixer_config
from subquad.interface import Dims, TokenMixer, Traits
from subquad.mechanisms.full import FullConfig
from subquad.registry import register

REFUSING = ("bidirectional", "causal", "cross", "padding", "segments", "state")


def lacking(trait: str) -> list[str]:
    return [name for name in list_mixers() if not getattr(small_config(name).traits, trait)]


def offered(name: str) -> TokenMixer:
    """The mechanism in the first form that it offers."""
    traits = small_config(name).traits
    causal = not traits.bidirectional and traits.causal
    dims = replace(WIDE_HEADS, causal=causal, cross=not traits.bidirectional and not causal)
    return build_from_config(small_config(name), dims)


def build(name: str, **form: bool) -> TokenMixer:
    return build_from_config(small_config(name), replace(WIDE_HEADS, **form))


ATTEMPTS: dict[str, Callable[[str], object]] = {
    "bidirectional": lambda name: build(name),
    "causal": lambda name: build(name, causal=True),
    "cross": lambda name: build(name, cross=True),
    "padding": lambda name: offered(name)(torch.randn(2, 9, 24), mask=Mask.from_lengths([9, 4], 9)),
    "segments": lambda name: offered(name)(torch.randn(1, 9, 24), mask=Mask(segments=torch.arange(9)[None])),
    "state": lambda name: offered(name).init_state(2),
}
CASES = [pytest.param(name, trait, id=f"{name}-{trait}") for trait in REFUSING for name in lacking(trait)]


@pytest.mark.parametrize(("name", "trait"), CASES)
def test_a_false_trait_is_refused_and_the_able_are_named(name: str, trait: str) -> None:
    able = ", ".join(list_mixers(**{trait: True})) or "none"
    with pytest.raises(
        ValueError, match=rf"^{name}: .* is not supported; mechanisms that support it: {re.escape(able)}"
    ):
        ATTEMPTS[trait](name)


@pytest.mark.parametrize(
    ("name", "trait", "asked", "options", "forbidding"),
    [
        ("routing", "causal", "causal=True", {"window": 4, "shared": False}, "shared"),
        ("routing", "state", "a state", {"shared": False}, "shared"),
        ("topk", "causal", "causal=True", {"top_k": 2, "fraction": 4}, "fraction"),
        ("topk", "segments", "mask.segments", {"fraction": 4}, "fraction"),
        ("sinkhorn", "causal", "causal=True", {"block": 4, "sort_cut": 1}, "sort_cut"),
        ("sinkhorn", "state", "a state", {"sort_cut": 1}, "sort_cut"),
        ("aft", "causal", "causal=True", {"kind": "conv", "columns": 3}, "columns"),
        ("sparse_transformer", "segments", "mask.segments", {"kind": "fixed"}, "kind"),
        ("combiner", "bidirectional", "causal=False", {"plan": "mixture", "mixture": "joint"}, "mixture"),
    ],
)
def test_a_trait_that_an_option_forbids_is_refused_naming_the_option_and_other_mechanisms(
    name: str, trait: str, asked: str, options: dict[str, object], forbidding: str
) -> None:
    config = mixer_config(name, **options)
    others = ", ".join(other for other in list_mixers(**{trait: True}) if other != name)
    message = (
        f"{name}: {asked} is not supported with {forbidding}={options[forbidding]!r}; leave out {forbidding}, or "
        f"choose another mechanism that supports it: {others}"
    )
    attempts: dict[str, Callable[[], object]] = {
        "bidirectional": lambda: build_from_config(config, WIDE_HEADS),
        "causal": lambda: build_from_config(config, replace(WIDE_HEADS, causal=True)),
        "segments": lambda: build_from_config(config, WIDE_HEADS)(
            torch.randn(1, 9, 24), mask=Mask(segments=torch.arange(9)[None])
        ),
        "state": lambda: build_from_config(config, WIDE_HEADS).init_state(2),
    }
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        attempts[trait]()


@dataclass(frozen=True, kw_only=True)
class TwiceForbiddenConfig(FullConfig):
    """Dense attention that is causal where both options are left out."""

    narrow: bool = False
    short: bool = False

    @property
    def traits(self) -> Traits:
        return replace(super().traits, causal=not (self.narrow or self.short))


def test_where_several_options_forbid_a_trait_all_are_named() -> None:
    register("twice_forbidden")(TwiceForbiddenConfig)
    asked = (
        r"twice_forbidden: causal=True is not supported with narrow=True, short=True; leave out narrow and short, or"
    )
    with pytest.raises(ValueError, match=asked):
        build_from_config(TwiceForbiddenConfig(narrow=True, short=True), replace(WIDE_HEADS, causal=True))


@pytest.mark.parametrize("name", list_mixers(state=True, bidirectional=True))
def test_a_bidirectional_form_has_no_state_and_takes_none(name: str) -> None:
    mixer = build(name)
    with pytest.raises(ValueError, match=rf"^{name}: a state needs causal=True or cross=True"):
        mixer.init_state(2)
    state = build(name, causal=True).init_state(2)
    with pytest.raises(ValueError, match=rf"^{name}: a state needs causal=True or cross=True"):
        mixer(torch.randn(2, 9, 24), state=state)


@pytest.mark.parametrize("name", list_mixers(state=True, causal=True))
def test_a_state_of_another_mechanism_size_or_batch_is_refused(name: str) -> None:
    mixer, x = build(name, causal=True), torch.randn(2, 9, 24)
    for other in list_mixers(state=True, causal=True):
        foreign = build(other, causal=True).init_state(2)
        if type(foreign) is not type(mixer.init_state(2)):
            with pytest.raises(ValueError, match=rf"^{name}: the state is a \w+, expected a \w+ from init_state"):
                mixer(x, state=foreign)
    with pytest.raises(ValueError, match=rf"^{name}: the state holds 3 rows but x has 2"):
        mixer(x, state=mixer.init_state(3))
    narrow = build_from_config(mixer.config, replace(mixer.dims, embed_dim=16, head_dim=4)).init_state(2)
    with pytest.raises(ValueError, match=rf"^{name}: state\.\w+ has shape \(B, .*other sizes or options"):
        mixer(x, state=narrow)


@pytest.mark.parametrize("name", lacking("global_tokens"))
def test_ignored_global_tokens_leave_one_receipt_a_call(name: str) -> None:
    mixer = offered(name)
    x = torch.randn(1, 9, 24)
    context = x if mixer.dims.cross else None
    with receipts() as collected:
        for _ in range(3):
            mixer(x, context, mask=Mask(global_tokens=torch.ones(1, 9, dtype=torch.bool)))
    (receipt,) = [entry for entry in collected.entries if entry.asked == "global_tokens"]
    assert (receipt.where, receipt.asked, receipt.ran, receipt.count) == (name, "global_tokens", "ignored", 3)
    assert ", ".join(list_mixers(global_tokens=True)) in receipt.reason


@pytest.mark.parametrize("name", list_mixers(fixed_length=True))
def test_a_fixed_length_needs_max_length_and_holds_it(name: str) -> None:
    dims = make_dims(embed_dim=24, num_heads=2)
    with pytest.raises(ValueError, match=rf"^{name}: its parameters depend on the length; pass max_length"):
        build_from_config(small_config(name), dims)
    mixer = build_from_config(small_config(name), replace(dims, max_length=9))
    mixer(torch.randn(1, 9, 24))
    with pytest.raises(ValueError, match=rf"^{name}: x has length 10 but was built for max_length=9"):
        mixer(torch.randn(1, 10, 24))


@pytest.mark.parametrize("name", [name for name in list_mixers() if mixer_config(name).why_not_rotary])
def test_rotary_positions_are_refused_with_the_reason(name: str) -> None:
    dims = replace(offered(name).dims, positions="rotary")
    with pytest.raises(ValueError, match=rf"^{name}: positions='rotary' is not supported, .+; use positions='none'$"):
        build_from_config(small_config(name), dims)


class TestInputs:
    """Checks that all mechanisms share."""

    @pytest.fixture(params=list_mixers())
    def mixer(self, request: pytest.FixtureRequest) -> TokenMixer:
        return offered(request.param)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.zeros(2, 9, 24, dtype=torch.int64), "x must be floating point, got torch.int64"),
            (torch.zeros(2, 9, 23), r"x must have shape \(B, L, 24\), got \(2, 9, 23\)"),
            (torch.zeros(9, 24), r"x must have shape \(B, L, 24\), got \(9, 24\)"),
            (torch.zeros(2, 0, 24), r"x has no tokens, shape \(2, 0, 24\); pass at least one"),
        ],
    )
    def test_a_wrong_stream_is_refused(self, mixer: TokenMixer, x: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            mixer(x, x)

    @pytest.mark.parametrize(
        ("theirs", "ours"), [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=["wider", "narrower"]
    )
    def test_a_stream_of_another_dtype_than_the_parameters_is_refused(
        self, mixer: TokenMixer, theirs: torch.dtype, ours: torch.dtype
    ) -> None:
        x = torch.zeros(2, 9, 24, dtype=theirs)
        message = re.escape(
            f"x has dtype {theirs} but the mixer's parameters have {ours}; pass x.to({ours}), or convert the mixer "
            f"with mixer.to({theirs})"
        )
        context = x if mixer.dims.cross else None
        with pytest.raises(ValueError, match=rf"^{mixer.config.name}: {message}$"):
            mixer.to(ours)(x, context)
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),  # which leaves float64 as it is
            pytest.raises(ValueError, match=message),
        ):
            mixer(x, context)

    def test_autocast_takes_streams_that_it_narrows(self, mixer: TokenMixer) -> None:
        x = torch.randn(2, 9, 24, dtype=torch.bfloat16)
        context = x.float() if mixer.dims.cross else None
        with pytest.raises(
            ValueError, match=r"x has dtype torch\.bfloat16 but the mixer's parameters have torch\.float32"
        ):
            mixer(x, context)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = mixer(x, context).y
        assert y.dtype == torch.bfloat16
        assert bool(y.isfinite().all())

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (Mask(valid=torch.ones(2, 8, dtype=torch.bool)), r"mask.valid must have shape .* = \(2, 9\), got \(2, 8\)"),
            (Mask(segments=torch.tensor([[1] * 8 + [0]] * 2)), "mask.segments must not decrease"),
            (Mask(valid=torch.ones(2, 9, dtype=torch.bool, device="meta")), r"mask.valid is on meta but .* on cpu"),
            (torch.ones(2, 9, dtype=torch.bool), "mask must be a subquad.Mask, got Tensor"),
        ],
    )
    def test_a_wrong_mask_is_refused(self, mixer: TokenMixer, mask: Mask, message: str) -> None:
        context = torch.zeros(2, 9, 24) if mixer.dims.cross else None
        with pytest.raises(ValueError, match=message):
            mixer(torch.zeros(2, 9, 24), context, mask=mask)

    def test_a_context_without_cross_is_refused(self, mixer: TokenMixer) -> None:
        if mixer.dims.cross:
            pytest.skip("this mechanism is cross-attention alone")
        with pytest.raises(ValueError, match="got a context, but was built with cross=False"):
            mixer(torch.zeros(2, 9, 24), torch.zeros(2, 9, 24))


@pytest.mark.parametrize("name", list_mixers(cross=True))
def test_cross_attention_needs_a_fitting_context(name: str) -> None:
    mixer, x = build(name, cross=True), torch.zeros(2, 9, 24)
    with pytest.raises(ValueError, match=r"was built with cross=True and needs context \(B, S, D\)"):
        mixer(x)
    with pytest.raises(ValueError, match="context has 3 rows but x has 2"):
        mixer(x, torch.zeros(3, 5, 24))
    with pytest.raises(ValueError, match="context has no tokens"):
        mixer(x, torch.zeros(2, 0, 24))
    with pytest.raises(ValueError, match=r"context has dtype torch\.float64 .* pass context\.to\(torch\.float32\)"):
        mixer(x, torch.zeros(2, 5, 24, dtype=torch.float64))


@pytest.mark.parametrize("name", list_mixers(cross=True, state=True))
def test_a_state_takes_one_context_and_only_in_its_first_call(name: str) -> None:
    mixer, x, context = build(name, cross=True), torch.randn(2, 9, 24), torch.randn(2, 5, 24)
    with pytest.raises(ValueError, match=rf"^{name}: the state holds no context yet; pass context"):
        mixer(x, state=mixer.init_state(2))
    state = mixer(x, context, state=mixer.init_state(2)).state
    with pytest.raises(ValueError, match=rf"^{name}: the state holds a context already; pass context=None"):
        mixer(x, context, state=state)
    with pytest.raises(ValueError, match="context_mask goes with context"):
        mixer(x, context_mask=Mask.from_lengths([5, 5], 5), state=state)


def test_cross_excludes_causal() -> None:
    with pytest.raises(ValueError, match="cross=True excludes causal=True"):
        Dims(embed_dim=8, num_heads=2, head_dim=4, causal=True, cross=True)
