"""ListOps of Long Range Arena: compute the value of a nested expression of list operators.

An example is one expression and one digit. As a line of the file, and as the model sees it:

    ( ( ( ( [MAX 2 ) ( ( ( ( [MED 4 ) 7 ) 9 ) ] ) ) 3 ) ] )<TAB>7

    [MAX  2  [MED  4  7  9   ]  3   ]        label 7
      12  3    13  5  8 10  15  4  15        ids: digit d is d + 1, operators 11 .. 14, "]" 15

MIN and MAX are what they say, MED is the median (two middle values: their mean, rounded down), SM the sum modulo 10.
Full-size expressions have 501 to 1999 tokens and nest up to ten levels, so that the answer hangs on brackets far apart.
Always guessing the most frequent digit is right for about one in six.

The released archive may be out of reach, so the same distribution is generated here (`listops_generator`); the released
files are read as well (`listops_reader`). Truncation is refused: the value of half an expression is another value.
"""

from pathlib import Path
from typing import ClassVar

from subquad.tasks.base import DataPreset, Progress, Task
from subquad.tasks.kinds import ClassificationData
from subquad.tasks.listops_expression import evaluate, symbols, tokenize
from subquad.tasks.listops_generator import generate
from subquad.tasks.listops_manifest import Manifest, Recipe
from subquad.tasks.listops_reader import read_listops
from subquad.tasks.listops_tsv import FILE_NAMES

__all__ = ["ListopsTask", "evaluate", "generate", "read_listops", "symbols", "tokenize"]


class ListopsTask(Task):
    """Long ListOps and its short form; see the module."""

    name: ClassVar[str] = "listops"

    def prepare(
        self, directory: Path, preset: DataPreset, *, seed: int = 0, workers: int = 1, progress: Progress | None = None
    ) -> ClassificationData:
        """As in `Task`; files generated earlier are used if recipe and checksums agree, else generated again."""
        recipe = Recipe.from_preset(preset, seed)
        manifest = Manifest.read(directory)
        if manifest is None:
            _refuse_foreign_files(directory)
        if manifest is None or manifest.recipe != recipe or not manifest.matches(directory):
            generate(directory, preset, seed=seed, workers=workers, progress=progress)
        return self.read(directory, preset)

    def read(self, directory: Path, preset: DataPreset) -> ClassificationData:
        """As in `Task`; the number of examples is whatever the files hold."""
        return read_listops(directory, preset.max_length, preset=preset.name, title=preset.title, is_lra=preset.is_lra)


def _refuse_foreign_files(directory: Path) -> None:
    present = [name for name in FILE_NAMES.values() if (directory / name).exists()]
    if present:
        raise ValueError(
            f"{directory} holds {', '.join(present)} that were not generated here (there is no manifest.json), and "
            "they are not replaced: read them as your own data, delete them, or choose another folder"
        )
