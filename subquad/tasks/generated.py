"""Tasks whose examples are drawn from a seed whenever they are needed: nothing lies on disk.

Drawing takes at most seconds, so there is nothing to keep. The three splits come from three streams of the seed. They
may hold equal examples by chance; at the sizes of the presets that chance is none.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Generic

from subquad.tasks.base import DataPreset, Progress, Task, TaskData
from subquad.tasks.random_words import STREAMS, RandomWords
from subquad.tasks.splits import SplitT

Draw = Callable[[RandomWords, int], SplitT]
"""Called as `draw(words, count)`; returns a split of `count` examples."""


class GeneratedTask(Task, Generic[SplitT]):
    """A task that draws its examples."""

    reads_files: ClassVar[bool] = False

    @abstractmethod
    def drawing(self, preset: DataPreset) -> Draw[SplitT]:
        """What draws the examples of a preset.

        Raises:
            ValueError: if the preset's parameters make no sense.
        """

    @abstractmethod
    def gathered(self, preset: DataPreset, splits: dict[str, SplitT]) -> TaskData[SplitT]:
        """The data of a task from its three splits."""

    def prepare(
        self, directory: Path, preset: DataPreset, *, seed: int = 0, workers: int = 1, progress: Progress | None = None
    ) -> TaskData[SplitT]:
        """As in `Task`; `directory` and `workers` are of no consequence."""
        draw = self.drawing(preset)
        done, total = 0, sum(preset.counts.values())
        splits: dict[str, SplitT] = {}
        for name, count in preset.counts.items():
            splits[name] = draw(RandomWords(seed, STREAMS[name]), count)
            done += count
            if progress is not None:
                progress(done, total)
        return self.gathered(preset, splits)

    def read(self, path: Path, preset: DataPreset) -> TaskData[Any]:
        """Refused: there are no files.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"task {self.name!r} draws its examples from a seed and reads no files, got {path}: name no files for it"
        )
