from dataclasses import replace

import pytest
import torch
from stand_ins import OWN

from subquad.benchmark import profiler
from subquad.benchmark.mixers import parse_mixer
from subquad.benchmark.profiler import (
    measure_length,
    peak_bytes_in_fresh_process,
    profile_dims,
    profile_point,
)
from subquad.build import mixer_config
from subquad.training.presets import ProfileSettings

SETTINGS = ProfileSettings(embed_dim=16, num_heads=2, lengths=(16, 32), batch_size=3, rounds=4)


def test_every_mixer_is_measured_beside_dense_attention_in_the_same_form() -> None:
    configs = [mixer_config("linear"), parse_mixer(f"{OWN}:CausalConfig").config]
    mixers, dense = measure_length(configs, SETTINGS, 16)
    for measured in (*mixers, *dense):
        assert len(measured.forward) == len(measured.forward_backward) == 4
        assert min(*measured.forward, *measured.forward_backward) > 0
        assert measured.saved_bytes > 0
    bidirectional, causal = dense
    assert bidirectional.cost.flops > causal.cost.flops
    assert mixers[1].cost == causal.cost


def test_mixers_and_dense_attention_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def recording(functions: dict[str, object], *, rounds: int) -> dict[str, list[float]]:
        asked.append(list(functions))
        return {name: [1.0] * rounds for name in functions}

    monkeypatch.setattr(profiler, "interleaved_seconds", recording)
    measure_length([mixer_config("linear"), mixer_config("local", window=9)], SETTINGS, 16)
    assert asked == [["0", "1", "2"]] * 2


def test_a_profile_is_of_the_batch() -> None:
    one, three = (
        measure_length([mixer_config("linear")], replace(SETTINGS, batch_size=size), 16)[0][0] for size in (1, 3)
    )
    assert three.cost.flops == 3 * one.cost.flops
    assert three.saved_bytes > 2 * one.saved_bytes


def test_longer_sequences_keep_more() -> None:
    kept = [measure_length([mixer_config("full")], SETTINGS, length)[0][0].saved_bytes for length in (16, 32, 64)]
    assert kept == sorted(kept)
    assert kept[0] < kept[2]


def test_a_mechanism_that_is_only_causal_is_profiled_causally() -> None:
    assert profile_dims(parse_mixer(f"{OWN}:CausalConfig").config, SETTINGS).causal
    assert not profile_dims(mixer_config("full"), SETTINGS).causal
    assert profile_dims(mixer_config("full"), SETTINGS, causal=True).causal
    assert profile_dims(mixer_config("full"), SETTINGS).max_length == 32
    with pytest.raises(ValueError, match="causal"):
        profile_dims(parse_mixer(f"{OWN}:SoundConfig").config, SETTINGS, causal=True)
    with pytest.raises(ValueError, match="7 or 9"):
        profile_dims(mixer_config("local", window=8), SETTINGS)


def test_a_point_holds_both_sides() -> None:
    mixers, dense = measure_length([mixer_config("linear")], SETTINGS, 16)
    point = profile_point(16, mixers[0], dense[0], 5, None)
    assert point.forward.samples_seconds == tuple(mixers[0].forward)
    assert point.dense_forward_backward.samples_seconds == tuple(dense[0].forward_backward)
    assert (point.saved_bytes, point.dense_saved_bytes) == (mixers[0].saved_bytes, dense[0].saved_bytes)
    assert (point.peak_bytes, point.dense_peak_bytes) == (5, None)
    assert point.cost.flops != point.dense_cost.flops


def test_input_and_parameters_get_gradients_in_what_is_timed() -> None:
    subject = profiler._Subject(mixer_config("full"), profile_dims(mixer_config("full"), SETTINGS), SETTINGS, 16)
    subject.forward_backward()
    assert subject.x.grad is not None
    assert all(parameter.grad is not None for parameter in subject.mixer.parameters())
    assert not subject.forward().requires_grad
    first = subject.x.grad.clone()
    subject.forward_backward()
    torch.testing.assert_close(subject.x.grad, first)  # not added up


@pytest.mark.slow
def test_the_peak_rises_with_the_length_in_a_fresh_process(capfd: pytest.CaptureFixture[str]) -> None:
    settings = ProfileSettings(embed_dim=64, num_heads=2, lengths=(256, 4_096), batch_size=4)
    peaks = peak_bytes_in_fresh_process("linear", settings)
    if not peaks:
        pytest.skip("the system doesn't tell a process's peak")
    assert peaks[4_096] > peaks[256] + 4 * 4_096 * 64 * 4
    assert peak_bytes_in_fresh_process(f"{OWN}:KillsConfig", settings) == {}
    assert peak_bytes_in_fresh_process(f"{OWN}:RaisesConfig", settings) == {}
    assert "Traceback" not in capfd.readouterr().err
