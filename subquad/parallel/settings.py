"""What the training program is told, and its command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

FREE_TO_CHANGE = (
    *("steps", "output", "resume", "model_parallel", "device", "checkpoint_every", "keep", "report_every"),
    "timeout_seconds",
)
"""Settings that a run may go on with another value of."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run. Sizes of the model, then of the training, then of the program."""

    mixer: Any = "full"
    feedforward: Any = "switch"
    objective: Literal["causal", "masked"] = "causal"
    layers: int = 4
    width: int = 256
    heads: int = 4
    hidden: int = 1024
    length: int = 256
    text: tuple[str, ...] = ()
    batch: int = 32
    steps: int = 1000
    learning_rate: float = 1e-3
    warm_up: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    masked_share: float = 0.15
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    model_parallel: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    output: str = "subquad-parallel"
    checkpoint_every: int = 100
    keep: int = 2
    report_every: int = 10
    resume: bool = False
    timeout_seconds: int = 60

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: naming the option, what was expected and what was got.
        """
        positive = ("layers", "width", "heads", "hidden", "batch", "steps", "learning_rate", "warm_up", "clip")
        for name in (*positive, "model_parallel", "checkpoint_every", "keep", "report_every", "timeout_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{option(name)} must be above 0, got {getattr(self, name)}")
        if self.length < 2:
            raise ValueError(f"--length must be at least 2, got {self.length}")
        if not 0 < self.masked_share < 1:
            raise ValueError(f"--masked-share must be in (0, 1), got {self.masked_share}")

    def fixed(self) -> dict[str, Any]:
        """What a run that goes on must be told again, JSON-ready."""
        written = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in written.items() if name not in FREE_TO_CHANGE}

    def check_continues(self, before: dict[str, Any]) -> None:
        """Check that these settings go on with a run.

        Raises:
            ValueError: one that may not change has changed.
        """
        for name, value in self.fixed().items():
            if name in before and before[name] != value:
                raise ValueError(
                    f"the run that --resume goes on with had {option(name)} {before[name]!r}, not {value!r}; give the "
                    "same, or another --output for another run"
                )


def option(name: str) -> str:
    """A field's name on the command line."""
    return "--" + name.replace("_", "-")


_HELP = {
    "mixer": "token mixer: a name, or JSON with a name and options, or a JSON list of these, tiled over the layers",
    "feedforward": "channel mixer, in the same forms; switch and moe have experts",
    "objective": "predict the next byte, or hidden bytes",
    "layers": "depth",
    "width": "D, channels of the stream",
    "heads": "H, attention heads",
    "hidden": "F, hidden channels of a feed-forward, or of an expert",
    "length": "L, bytes of an example",
    "text": "files, read as bytes; Python's own sources unless given",
    "batch": "examples a step, of all processes together",
    "steps": "steps of the whole run",
    "learning_rate": "of AdamW, at its highest",
    "warm_up": "steps to there; from there on it falls with the root of the step",
    "weight_decay": "of AdamW, on matrices",
    "clip": "largest norm of the gradient",
    "masked_share": "of the bytes that a masked model predicts",
    "dropout": "rate",
    "dtype": "of products and of what is sent to experts; parameters are float32",
    "seed": "of parameters, data and dropout",
    "model_parallel": "processes that share each layer's heads and hidden channels",
    "device": "cuda takes one GPU a process",
    "output": "folder for checkpoints",
    "checkpoint_every": "steps from a checkpoint to the next",
    "keep": "checkpoints that are kept",
    "report_every": "steps from a line of progress to the next",
    "resume": "go on from the last checkpoint in the output folder, if there is one",
    "timeout_seconds": "a process that hears nothing so long gives up; longer than a step and a checkpoint take",
}


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Settings of a command line.

    Raises:
        ValueError: a value out of range.
    """
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m subquad.parallel.train",
        description="Train a language model of bytes on many processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in fields(Settings):
        parser.add_argument(option(field.name), **_argument(field.name, field.default))
    given = vars(parser.parse_args(arguments))
    return Settings(**{**given, "text": tuple(given["text"])})


def _argument(name: str, default: Any) -> dict[str, Any]:
    described: dict[str, Any] = {"help": _HELP[name], "default": default}
    choices = {"objective": ("causal", "masked"), "dtype": ("float32", "bfloat16"), "device": ("cpu", "cuda")}
    if name in choices:
        return described | {"choices": choices[name]}
    if name in ("mixer", "feedforward"):
        return described | {"type": _written}
    if name == "text":
        return described | {"nargs": "+", "metavar": "FILE"}
    if name == "resume":
        return {"help": _HELP[name], "action": "store_true"}
    return described | {"type": type(default), "metavar": type(default).__name__.upper()}


def _written(text: str) -> Any:
    """A mixer: a name, or JSON."""
    if not text.startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from error


def text_files(settings: Settings, default: Sequence[Path]) -> list[Path]:
    """The files that the run reads.

    Raises:
        ValueError: one that isn't there.
    """
    files = [Path(name) for name in settings.text] or list(default)
    for path in files:
        if not path.is_file():
            raise ValueError(f"--text: there is no file {path}")
    return files
