"""Presets: the settings of a comparison, as TOML files, the same for every mechanism.

A preset has four tables: `[data]` (read by the task), `[model]`, `[training]` and `[profile]`. It never names a
mechanism: what differs between the rows of a comparison is the mixer alone. A user's own preset is a file like
subquad's, named by its path. Single training settings are changed behind colons, in a preset of either kind:

    quick    ./mine.toml    quick:learning_rate=3e-4:weight_decay=0.1
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import subquad
from subquad.config import coerce_fields, make_config, nearest, read_options, write_option
from subquad.records.conventions import MAX_SAMPLES
from subquad.tasks.base import DataPreset

PRESETS_DIRECTORY = Path(subquad.__file__).parent / "presets"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Sizes of the model; names as in `SubquadConfig`."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    positions: Literal["sinusoidal", "learned", "axial", "rotary", "none"] = "sinusoidal"
    pooling: Literal["cls", "first", "mean", "last"] = "cls"
    global_tokens: Literal["none", "first"] = "first"
    bias: bool = False
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Check types and ranges."""
        coerce_fields(self, "[model]")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            _require(self, "[model]", name, getattr(self, name) >= 1, "at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"[model]: hidden_size={self.hidden_size} must be a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        _require(self, "[model]", "dropout", 0 <= self.dropout < 1, "at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How every mechanism is trained: AdamW under a schedule, a fixed number of steps."""

    steps: int
    batch_size: int
    learning_rate: float
    """Peak of the schedule."""
    schedule: Literal["inverse_sqrt", "cosine", "linear", "constant_with_warmup"]
    warmup_steps: int
    evaluate_every: int
    """Steps between evaluations on the validation split; a checkpoint is written at each."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    gradient_clip: float = 0.0
    """Largest norm of the gradient; 0 leaves it alone."""
    label_smoothing: float = 0.0
    """Probability ε of the target that is spread evenly over all V tokens, q = (1 - ε) onehot + ε / V, in the training
    loss of sequence to sequence (arXiv 1706.03762, 5.4); scores are those of the plain target."""
    stream: bool = False
    """Whether consecutive windows of a document follow each other in a row of the batch; mechanisms whose state has a
    constant size then carry it from step to step."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        coerce_fields(self, "[training]")
        for name in ("steps", "batch_size", "evaluate_every"):
            _require(self, "[training]", name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "epsilon"):
            _require(self, "[training]", name, 0 < getattr(self, name) < math.inf, "positive")
        for name in ("warmup_steps", "weight_decay", "gradient_clip"):
            _require(self, "[training]", name, 0 <= getattr(self, name) < math.inf, "at least 0")
        for name in ("beta1", "beta2", "label_smoothing"):
            _require(self, "[training]", name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        if self.steps % self.evaluate_every:
            raise ValueError(
                f"[training]: steps={self.steps} must be a multiple of evaluate_every={self.evaluate_every}, "
                "so that the last step is evaluated"
            )


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """Where speed and memory are measured: one layer's mixer, its projections included."""

    embed_dim: int
    """Width of the layer; in a preset the model's."""
    num_heads: int
    """Heads of the layer; in a preset the model's."""
    lengths: tuple[int, ...]
    batch_size: int = 1
    rounds: int = 5
    """Samples of each measurement; the mechanism and dense attention take turns."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        coerce_fields(self, "[profile]")
        if not self.lengths or min(self.lengths) < 1 or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"[profile]: lengths must be positive and increasing, got {list(self.lengths)}")
        for name in ("embed_dim", "num_heads", "batch_size", "rounds"):
            _require(self, "[profile]", name, getattr(self, name) >= 1, "at least 1")
        _require(self, "[profile]", "rounds", self.rounds <= MAX_SAMPLES, f"at most {MAX_SAMPLES}")


def _require(settings: object, table: str, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{table}: {name} must be {expected}, got {getattr(settings, name)}")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings of a comparison.

    Attributes:
        task: name of the task.
        name: of the preset, as records keep it. That of a user's file, or with changed settings, ends with a hash of
            `[training]`, so that runs under different settings are never taken for each other.
        source: the name or path that the user writes.
        data: which examples.
        model: sizes.
        training: optimiser and budget.
        profile: where speed is measured.
        changed: training settings that differ from those of the source.
    """

    task: str
    name: str
    source: str
    data: DataPreset
    model: ModelSettings
    training: TrainingSettings
    profile: ProfileSettings
    changed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what two tables have to agree on."""
        if self.training.stream and self.model.positions in ("learned", "axial"):
            raise ValueError(
                f"preset {self.name!r}: stream = true goes beyond any table of positions, got positions = "
                f"{self.model.positions!r}; use 'sinusoidal', 'rotary' or 'none'"
            )

    @property
    def text(self) -> str:
        """What the user writes to name it, changed settings included."""
        return ":".join([self.source, *(write_option(name, value) for name, value in self.changed.items())])

    def with_training(self, settings: Mapping[str, Any]) -> Preset:
        """The same preset under other training settings; a setting that it has already is no change.

        Raises:
            ValueError: an unknown setting, a wrong type or value, or one that was changed before.
        """
        twice = sorted(settings.keys() & self.changed.keys())
        if twice:
            raise ValueError(f"preset {self.text}: {twice[0]} is changed already; give it once")
        before = asdict(self.training)
        training = make_config(TrainingSettings, f"preset {self.text}, [training]", {**before, **settings})
        changed = {name: value for name, value in asdict(training).items() if value != before[name]}
        if not changed:
            return self
        name = f"{self.data.name}-{_digest(training)}"
        return replace(self, name=name, training=training, changed={**self.changed, **changed})

    def model_dict(self) -> dict[str, Any]:
        """The model's sizes, as records keep them."""
        return asdict(self.model)


def list_presets(task: str) -> list[str]:
    """Names of the presets of a task."""
    return sorted(path.stem for path in (PRESETS_DIRECTORY / task).glob("*.toml"))


def load_preset(task: str, name: str) -> Preset:
    """Read a preset: one of subquad's by its name, or a user's own by the path of its file, which ends in .toml.

    Either may be followed by training settings to change, each behind a colon.

    Raises:
        ValueError: unknown preset, or a file that isn't there, doesn't parse or has other tables or keys than it
            should; the message names the file. Or a setting that isn't there, or a wrong value for it.
    """
    source, *changes = [name] if name.endswith(".toml") else name.split(":")
    return _load_source(task, source).with_training(read_options(name, changes))


def _load_source(task: str, name: str) -> Preset:
    if name.endswith(".toml"):
        return _read_own(task, Path(name))
    known = list_presets(task)
    if name not in known:
        own = "or name a file of your own, as ./my-preset.toml"
        raise ValueError(f"unknown preset {name!r} of task {task!r}; {nearest(name, known).rstrip('.')}; {own}")
    return _read(task, PRESETS_DIRECTORY / task / f"{name}.toml")


def _read_own(task: str, path: Path) -> Preset:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such preset file")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}", path.stem):
        raise ValueError(f"{path}: folders are called after the file; name it with letters, digits, '.', '_' and '-'")
    preset = _read(task, path)
    return replace(preset, name=f"{preset.name}-{_digest(preset.training)}", source=str(path))


def _digest(training: TrainingSettings) -> str:
    return hashlib.sha256(json.dumps(asdict(training), sort_keys=True).encode()).hexdigest()[:10]


def _read(task: str, path: Path) -> Preset:
    try:
        return preset_from_tables(task, path.stem, tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def preset_from_tables(task: str, name: str, tables: Mapping[str, Any]) -> Preset:
    """Build a preset from its parsed tables.

    Raises:
        ValueError: missing or unknown tables or keys, or wrong types.
    """
    expected = {"data", "model", "training", "profile"}
    if tables.keys() != expected or not all(isinstance(table, dict) for table in tables.values()):
        raise ValueError(f"preset {name!r}: expected the tables {sorted(expected)}, got {sorted(tables)}")
    model = make_config(ModelSettings, f"preset {name!r}, [model]", tables["model"])
    training = make_config(TrainingSettings, f"preset {name!r}, [training]", tables["training"])
    widths = {"embed_dim": model.hidden_size, "num_heads": model.num_attention_heads}
    return Preset(
        task=task,
        name=name,
        source=name,
        data=DataPreset.from_table(name, tables["data"]),
        model=model,
        training=training,
        profile=make_config(ProfileSettings, f"preset {name!r}, [profile]", {**widths, **tables["profile"]}),
    )
