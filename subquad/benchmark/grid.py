"""The grid of a sweep: what is varied, and the trials that it gives to every mechanism.

    learning_rate=1e-3,3e-4      a training setting, for every mechanism
    local.window=9,17            an option of one mechanism
    full.weight_decay=0,0.1      a training setting for one mechanism alone, where it has no option of that name

The trials of a mechanism are all combinations of the values that concern it, the last of them varying fastest. Every
mechanism has equally many trials, or the sweep is refused: what may choose among more set-ups wins by choosing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from subquad.benchmark.mixers import NamedMixer, parse_mixer
from subquad.benchmark.runs import SetUp
from subquad.config import COMMA, field_names, nearest, read_value, write_option
from subquad.training.presets import Preset, TrainingSettings

_EXAMPLE = "such as --grid learning_rate=1e-3,3e-4 or --grid local.window=9,17"


@dataclass(frozen=True)
class Axis:
    """One thing that is varied.

    Attributes:
        mechanism: registered name of the only mechanism that it concerns, or "" for all.
        name: of a training setting or of an option.
        values: as written, at least one.
    """

    mechanism: str
    name: str
    values: tuple[Any, ...]

    def __str__(self) -> str:
        """What stands before the equals sign."""
        return f"{self.mechanism}.{self.name}" if self.mechanism else self.name


@dataclass(frozen=True)
class Trial:
    """One point of the grid for one mechanism; trained with every seed.

    Attributes:
        mechanism: its registered name; the best of its trials stands for it.
        settings: training settings that the grid varies, with their values here.
        options: likewise of the mechanism.
        set_up: the mechanism and the preset, so changed.
    """

    mechanism: str
    settings: dict[str, Any]
    options: dict[str, Any]
    set_up: SetUp

    @property
    def point_text(self) -> str:
        """The point in words: "learning_rate=0.001 window=9"."""
        return " ".join(write_option(*varied) for varied in (*self.settings.items(), *self.options.items()))


def read_axes(texts: Sequence[str]) -> list[Axis]:
    """What `--grid` said, each time that it was given.

    Raises:
        ValueError: none, another form than name=value,value, or a name that is given twice.
    """
    if not texts:
        raise ValueError(
            f"a sweep needs --grid at least once, {_EXAMPLE}; `subquad compare` trains under the preset as it is"
        )
    axes = [_read_axis(text) for text in texts]
    for name, count in Counter(map(str, axes)).items():
        if count > 1:
            raise ValueError(f"--grid {name} is given {count} times; give all its values at once")
    return axes


def make_trials(axes: Sequence[Axis], mixers: Sequence[NamedMixer], preset: Preset) -> list[Trial]:
    """The trials in their order: the first of every mechanism, the second of every mechanism, and so on.

    Args:
        axes: of the grid.
        mixers: the mechanisms, as named.
        preset: the settings that hold where the grid says nothing.

    Raises:
        ValueError: a mechanism that is named twice or not at all, an unknown setting or option, a value that it can't
            have, two trials that are the same, or mechanisms with different numbers of trials.
    """
    names = [mixer.config.name for mixer in mixers]
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(
                f"--mixers names {name} {count} times; a sweep takes each mechanism once, so that all have equally "
                f"many trials: vary its options by --grid {name}.OPTION=value,value"
            )
    for axis in axes:
        if axis.mechanism and axis.mechanism not in names:
            known = nearest(axis.mechanism, names)
            raise ValueError(f"--grid {axis}: {axis.mechanism!r} is not in this sweep; {known}")
    trials = {mixer.text: _trials_of(mixer, axes, preset) for mixer in mixers}
    counts = {text: len(own) for text, own in trials.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            "every mechanism needs equally many trials, got "
            + ", ".join(f"{text} {count}" for text, count in counts.items())
            + "; vary something for the others too, such as --grid full.learning_rate=1e-3,3e-4"
        )
    return [trial for of_all in zip(*trials.values(), strict=True) for trial in of_all]


def _read_axis(text: str) -> Axis:
    key, _, values = text.partition("=")
    mechanism, _, name = key.strip().rpartition(".")
    parts = [part.strip() for part in COMMA.split(values)]
    if not (name and all(parts)):
        raise ValueError(f"--grid {text!r}: expected name=value,value, {_EXAMPLE}")
    return Axis(mechanism, name, tuple(read_value(part) for part in parts))


def _trials_of(mixer: NamedMixer, axes: Sequence[Axis], preset: Preset) -> list[Trial]:
    own = [axis for axis in axes if axis.mechanism in ("", mixer.config.name)]
    settings = [axis.name for axis in own if _is_setting(axis, mixer)]
    for name, count in Counter(settings).items():
        if count > 1:
            raise ValueError(
                f"--grid {name} and --grid {mixer.config.name}.{name} both vary it for {mixer.text}; drop one"
            )
    trials: list[Trial] = []
    for values in product(*(axis.values for axis in own)):
        chosen = list(zip(own, values, strict=True))
        of_training = {axis.name: value for axis, value in chosen if _is_setting(axis, mixer)}
        of_mixer = {axis.name: value for axis, value in chosen if not _is_setting(axis, mixer)}
        trial = _trial(mixer, of_mixer, preset, of_training)
        if any(trial.set_up == earlier.set_up for earlier in trials):
            raise ValueError(f"--grid: {mixer.text} has the trial {trial.point_text} twice; give each value once")
        trials.append(trial)
    return trials


def _trial(mixer: NamedMixer, options: dict[str, Any], preset: Preset, settings: dict[str, Any]) -> Trial:
    written = [write_option(name, value) for name, value in options.items()]
    varied = parse_mixer(":".join([mixer.text, *written])) if written else mixer
    changed = preset.with_training(settings)
    return Trial(
        mechanism=mixer.config.name,
        settings={name: getattr(changed.training, name) for name in settings},
        options={name: getattr(varied.config, name) for name in options},
        set_up=SetUp(varied, changed),
    )


def _is_setting(axis: Axis, mixer: NamedMixer) -> bool:
    """Whether the axis varies a training setting; behind a mechanism's name, an option of it comes first."""
    settings = field_names(TrainingSettings)
    options = field_names(type(mixer.config)) if axis.mechanism else []
    if axis.name in settings or axis.name in options:
        return axis.name not in options
    if axis.mechanism:
        raise ValueError(
            f"--grid {axis}: {axis.mechanism} has no such option, nor has the training such a setting; "
            f"{nearest(axis.name, [*settings, *options])}"
        )
    raise ValueError(
        f"--grid {axis}: unknown training setting; {nearest(axis.name, settings)} An option of a mechanism is written "
        f"MECHANISM.{axis.name}"
    )
