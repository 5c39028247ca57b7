"""A grid gives every mechanism equally many different trials, or says why it can't."""

from __future__ import annotations

from typing import Any

import pytest

from subquad.benchmark.grid import Trial, make_trials, read_axes
from subquad.benchmark.mixers import parse_mixer
from subquad.training.presets import Preset


def trials(tiny: Preset, mixers: str, *grid: str) -> list[Trial]:
    return make_trials(read_axes(grid), [parse_mixer(text) for text in mixers.split(",")], tiny)


def points(found: list[Trial]) -> list[tuple[str, dict[str, Any]]]:
    return [(trial.mechanism, trial.settings | trial.options) for trial in found]


def test_trials_are_all_combinations_in_turns_over_the_mechanisms(tiny: Preset) -> None:
    found = trials(tiny, "full,linear", "learning_rate=1e-3,3e-4", "weight_decay=0,0.1")
    rates, decays = (1e-3, 3e-4), (0.0, 0.1)
    expected = [{"learning_rate": rate, "weight_decay": decay} for rate in rates for decay in decays]
    assert points(found) == [(name, point) for point in expected for name in ("full", "linear")]
    training = found[-1].set_up.preset.training
    assert (training.learning_rate, training.weight_decay) == (3e-4, 0.1)
    assert len({trial.set_up.preset.name for trial in found}) == 4
    assert found[-1].point_text == "learning_rate=0.0003 weight_decay=0.1"


def test_an_option_of_one_mechanism_is_matched_by_a_setting_of_the_other(tiny: Preset) -> None:
    found = trials(tiny, "full,local", "local.window=5,9", "full.learning_rate=1e-3,1e-4", "batch_size=4")
    assert points(found) == [
        ("full", {"learning_rate": 1e-3, "batch_size": 4}),
        ("local", {"window": 5, "batch_size": 4}),
        ("full", {"learning_rate": 1e-4, "batch_size": 4}),
        ("local", {"window": 9, "batch_size": 4}),
    ]
    assert [trial.set_up.mixer.text for trial in found] == ["full", "local:window=5", "full", "local:window=9"]
    assert found[1].set_up.mixer.config == parse_mixer("local:window=5").config
    assert found[1].set_up.preset.training.learning_rate == tiny.training.learning_rate


def test_a_trial_with_the_settings_of_the_preset_is_a_run_under_that_preset(tiny: Preset) -> None:
    first, second = trials(tiny, "full", "learning_rate=5e-3,1e-3")
    assert first.set_up.preset == tiny
    assert second.set_up.preset.changed == {"learning_rate": 1e-3}


def test_the_values_of_an_option_may_be_lists_and_words(tiny: Preset) -> None:
    found = trials(tiny, "reformer", "reformer.buckets=[2,4],8")
    assert [trial.options["buckets"] for trial in found] == [(2, 4), 8]
    assert [trial.set_up.mixer.text for trial in found] == ["reformer:buckets=[2,4]", "reformer:buckets=8"]
    assert [t.settings["schedule"] for t in trials(tiny, "full", "schedule=linear, cosine")] == ["linear", "cosine"]


def test_behind_the_name_of_a_mechanism_its_option_comes_before_a_training_setting(tiny: Preset) -> None:
    first, second = trials(tiny, "star", "star.steps=1,3", "steps=8")
    assert (first.options, second.options, second.settings) == ({"steps": 1}, {"steps": 3}, {"steps": 8})
    assert second.set_up.preset.training.steps == 8
    assert second.set_up.mixer.text == "star:steps=3"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((), r"a sweep needs --grid at least once, such as --grid learning_rate=1e-3,3e-4"),
        (("learning_rate",), r"--grid 'learning_rate': expected name=value,value"),
        (("learning_rate=",), r"expected name=value,value"),
        (("learning_rate=1e-3,,",), r"expected name=value,value"),
        (("=1e-3",), r"expected name=value,value"),
        (("learning_rat=1",), r"unknown training setting; did you mean 'learning_rate'\?.*written MECHANISM\.learn"),
        (("window=5,9",), r"--grid window: unknown training setting;.*is written MECHANISM\.window"),
        (("hidden_size=8",), r"--grid hidden_size: unknown training setting"),
        (("local.windw=5,9",), r"--grid local\.windw: local has no such option.*did you mean 'window'\?"),
        (("linear.chunk=5,9",), r"--grid linear\.chunk: 'linear' is not in this sweep; .*full, local"),
        (("learning_rate=fast",), r"option 'learning_rate' must be float, got 'fast'"),
        (("learning_rate=1e-3,-1",), r"\[training\]: learning_rate must be positive, got -1"),
        (("learning_rate=NaN",), r"learning_rate must be positive, got nan"),
        (("steps=25",), r"steps=25 must be a multiple of evaluate_every=8"),
        (("local.window=5,0", "full.steps=8,16"), r"local: window"),
        (("learning_rate=1e-3", "learning_rate=1e-4"), r"--grid learning_rate is given 2 times; give all"),
        (("full.steps=8", "full.steps=8"), r"--grid full\.steps is given 2 times"),
        (("steps=8,16", "local.steps=8"), r"--grid steps and --grid local\.steps both vary it for local"),
        (("learning_rate=1e-3,0.001",), r"full has the trial learning_rate=0\.001 twice; give each value once"),
        (("local.window=5,9",), r"equally many trials, got full 1, local 2; vary something for the others too"),
        (("local.window=5,9,7", "full.steps=8,16"), r"equally many trials, got full 2, local 3"),
    ],
)
def test_a_grid_that_can_not_be_is_refused(tiny: Preset, grid: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trials(tiny, "full,local", *grid)


def test_a_mechanism_is_named_once_and_its_options_are_set_in_one_place(tiny: Preset) -> None:
    with pytest.raises(ValueError, match=r"--mixers names local 2 times; .* by --grid local\.OPTION=value,value"):
        trials(tiny, "local:window=5,local:window=9", "steps=8,16")
    with pytest.raises(ValueError, match="'local:window=5:window=9': window is given twice"):
        trials(tiny, "local:window=5", "local.window=9")
    with pytest.raises(ValueError, match=r"tiny\.toml:steps=8: steps is changed already; give it once"):
        trials(tiny.with_training({"steps": 8}), "local", "steps=16")
