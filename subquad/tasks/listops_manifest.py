"""What generated ListOps files are: the recipe that makes them and the fingerprint of what was made.

`manifest.json` is written last, so a folder that has one holds complete files. A folder with the files but without the
manifest holds somebody else's data, which nothing here replaces.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from subquad.tasks.base import DataPreset
from subquad.tasks.listops_trees import Shape

MANIFEST_NAME = "manifest.json"
GENERATOR_VERSION = 1
"""Raised whenever the same recipe would give other files."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the files' bytes. Counts are in examples; the rest as in `Shape`."""

    generator_version: int
    seed: int
    train: int
    validation: int
    test: int
    longer_than: int
    shorter_than: int
    max_depth: int
    max_args: int

    @classmethod
    def from_preset(cls, preset: DataPreset, seed: int) -> "Recipe":
        """The recipe of a preset.

        Raises:
            ValueError: for missing or unknown generator parameters, bounds no expression meets or longer than the
                preset's `max_length`, or a negative seed.
        """
        if seed < 0:
            raise ValueError(f"the seed must not be negative, got {seed}")
        expected = list(Shape.__dataclass_fields__)
        if sorted(preset.generator) != sorted(expected):
            raise ValueError(
                f"[data] of preset {preset.name!r}: generator must have the keys {', '.join(expected)}, "
                f"got {', '.join(preset.generator) or 'none'}"
            )
        if preset.generator["shorter_than"] > preset.max_length + 1:
            raise ValueError(
                f"[data] of preset {preset.name!r}: shorter_than = {preset.generator['shorter_than']} lets expressions "
                f"be longer than max_length = {preset.max_length}: raise max_length or lower shorter_than"
            )
        recipe = cls(GENERATOR_VERSION, seed, preset.train, preset.validation, preset.test, **preset.generator)
        _ = recipe.shape
        return recipe

    @property
    def shape(self) -> Shape:
        """Bounds of the expressions."""
        return Shape(self.longer_than, self.shorter_than, self.max_depth, self.max_args)

    @property
    def counts(self) -> dict[str, int]:
        """Number of examples by split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


@dataclass(frozen=True)
class FileEntry:
    """One file: fingerprint and statistics. Lengths are in tokens; `labels[v]` examples have the value v."""

    name: str
    examples: int
    bytes: int
    sha256: str
    shortest: int
    mean_length: float
    longest: int
    labels: Sequence[int]

    def matches(self, directory: Path) -> bool:
        """Whether the file in `directory` is there and is, byte for byte, this one."""
        path = directory / self.name
        if not path.is_file() or path.stat().st_size != self.bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256


@dataclass(frozen=True)
class Manifest:
    """A recipe and the files that it gave."""

    recipe: Recipe
    files: Sequence[FileEntry]

    def matches(self, directory: Path) -> bool:
        """Whether every file in `directory` is as it was written."""
        return all(entry.matches(directory) for entry in self.files)

    def to_json(self) -> str:
        """Text of `manifest.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, directory: Path) -> "Manifest | None":
        """The manifest of a folder, or None if it has none.

        Raises:
            ValueError: if there is one that can't be understood.
        """
        path = directory / MANIFEST_NAME
        if not path.is_file():
            return None
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            return cls(Recipe(**table["recipe"]), [FileEntry(**entry) for entry in table["files"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"cannot read {path} ({error}): delete the folder to have its data generated again, or choose another"
            ) from error
