"""What a user asks of a command that trains: task and settings, mechanisms, seeds, and where everything lies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from subquad.benchmark.mixers import NamedMixer, parse_mixer
from subquad.records.conventions import DENSE
from subquad.training.presets import Preset


@dataclass(frozen=True)
class Request:
    """What to train.

    Attributes:
        preset: task and settings.
        mixers: the mechanisms.
        seeds: of the runs of each mechanism.
        output: folder of the records.
        data: folder of the task's data.
        generated: whether subquad generates that data, as against files of the user's.
        force: measure again what has a record already.
        save_model: folder for the model of a single run at its best validation score, or None.
    """

    preset: Preset
    mixers: tuple[NamedMixer, ...]
    seeds: tuple[int, ...]
    output: Path
    data: Path
    generated: bool
    force: bool = False
    save_model: Path | None = None

    def with_dense(self) -> Request:
        """The same, with dense attention as the first row, added if it isn't there: every comparison has it."""
        dense = parse_mixer(DENSE)
        others = tuple(mixer for mixer in self.mixers if mixer.config != dense.config)
        return replace(self, mixers=(dense, *others))
