import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from subquad.tasks.base import DataPreset
from subquad.tasks.listops import ListopsTask, generate, read_listops, tokenize
from subquad.tasks.listops_generator import draw_chunk
from subquad.tasks.listops_trees import Shape
from subquad.tasks.listops_tsv import FILE_NAMES

PRESET = DataPreset(
    name="tiny",
    title="tiny ListOps",
    is_lra=False,
    train=1200,
    validation=60,
    test=40,
    max_length=32,
    generator={"longer_than": 7, "shorter_than": 33, "max_depth": 3, "max_args": 5},
)

SPACE_OF_400 = {"longer_than": 3, "shorter_than": 5, "max_depth": 2, "max_args": 2}
"""One operator of four over two digits."""


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def rows(directory: Path) -> list[list[str]]:
    lines = [line for name in FILE_NAMES.values() for line in (directory / name).read_text().splitlines()[1:]]
    return [line.split("\t") for line in lines]


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_workers(tmp_path: Path):
    for workers in (1, 3):
        generate(tmp_path / str(workers), PRESET, seed=5, workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "3")


def test_another_seed_gives_other_expressions(tmp_path: Path):
    for seed in (0, 1):
        generate(tmp_path / str(seed), PRESET, seed=seed)
    first, second = (set(map(tuple, rows(tmp_path / seed))) for seed in "01")
    assert len(first & second) < 0.2 * len(first)


def test_files_on_disk_are_those_of_generator_version_1(tmp_path: Path):
    generate(tmp_path, PRESET)
    digest = hashlib.sha256(b"".join((tmp_path / name).read_bytes() for name in FILE_NAMES.values())).hexdigest()
    assert digest[:12] == "4f37751aa8e8"


def test_files_have_the_released_layout(tmp_path: Path):
    generate(tmp_path, PRESET)
    assert sorted(content(tmp_path)) == ["basic_test.tsv", "basic_train.tsv", "basic_val.tsv", "manifest.json"]
    for split, name in FILE_NAMES.items():
        lines = (tmp_path / name).read_bytes().split(b"\r\n")
        assert lines[0] == b"Source\tTarget"
        assert lines[-1] == b""
        assert len(lines) - 2 == getattr(PRESET, split)
        assert all(line.count(b"\t") == 1 and b"\n" not in line for line in lines[:-1])


def test_an_expression_appears_once_in_all_splits_together(tmp_path: Path):
    assert len({row.digest for row in draw_chunk(0, Shape(**SPACE_OF_400), 0)}) < len(
        draw_chunk(0, Shape(**SPACE_OF_400), 0)
    )
    generate(tmp_path, replace(PRESET, train=300, validation=50, test=50, generator=SPACE_OF_400))
    sources = [source for source, _ in rows(tmp_path)]
    assert len(set(sources)) == len(sources) == 400
    assert {len(tokenize(source)) for source in sources} == {4}


def test_first_come_are_train_then_validation_then_test(tmp_path: Path):
    generate(tmp_path / "all", PRESET)
    generate(tmp_path / "fewer", replace(PRESET, train=1000, validation=260))
    assert rows(tmp_path / "all") == rows(tmp_path / "fewer")


def test_the_manifest_says_what_is_in_the_files(tmp_path: Path):
    manifest = generate(tmp_path, PRESET, seed=3)
    stored = json.loads((tmp_path / "manifest.json").read_text())
    assert stored["recipe"] == {
        "generator_version": 1,
        "seed": 3,
        "train": 1200,
        "validation": 60,
        "test": 40,
        "longer_than": 7,
        "shorter_than": 33,
        "max_depth": 3,
        "max_args": 5,
    }
    data = read_listops(tmp_path)
    for entry, split in zip(stored["files"], (data.train, data.validation, data.test), strict=True):
        file = (tmp_path / entry["name"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(file).hexdigest()
        assert entry["bytes"] == len(file)
        assert entry["examples"] == len(split)
        assert entry["labels"] == np.bincount(split.labels, minlength=10).tolist()
        lengths = split.lengths
        assert (entry["shortest"], entry["longest"]) == (lengths.min(), lengths.max())
        assert entry["mean_length"] == pytest.approx(lengths.mean())
    assert manifest.matches(tmp_path)


def test_progress_ends_at_the_total(tmp_path: Path):
    calls: list[tuple[int, int]] = []
    generate(tmp_path, PRESET, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(500, 1300), (1000, 1300), (1300, 1300)]


def interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_generation_leaves_nothing(tmp_path: Path, workers: int):
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, PRESET, workers=workers, progress=interrupt)
    assert content(tmp_path) == {}


def test_an_interrupted_generation_leaves_the_earlier_files_alone(tmp_path: Path):
    generate(tmp_path, PRESET)
    before = content(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, PRESET, seed=1, progress=interrupt)
    assert content(tmp_path) == before


def run_script(script: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(["", *sys.path]).replace(os.pathsep * 2, os.pathsep)
    return subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )


def test_a_killed_generation_leaves_nothing_that_looks_finished(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom pathlib import Path\nfrom subquad.tasks.base import DataPreset\n"
        "from subquad.tasks.listops import generate\n"
        f"generate(Path({str(tmp_path / 'data')!r}), {PRESET!r}, progress=lambda done, total: os._exit(9))\n"
    )
    assert run_script(script).returncode == 9
    assert not [name for name in os.listdir(tmp_path / "data") if not name.startswith(".generating-")]
    assert len(ListopsTask().prepare(tmp_path / "data", PRESET).train) == 1200


def test_workers_in_an_unguarded_script_say_what_to_do(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom subquad.tasks.base import DataPreset\n"
        "from subquad.tasks.listops import generate\n"
        f"generate(Path({str(tmp_path / 'data')!r}), {PRESET!r}, workers=2)\n"
    )
    result = run_script(script)
    assert "ValueError: a process drawing ListOps expressions died: use workers=1, or guard" in result.stderr


def test_a_space_too_small_is_an_error(tmp_path: Path):
    tiny = replace(PRESET, generator=SPACE_OF_400)
    with pytest.raises(ValueError, match=r"found 400 different expressions .* 1300 were asked for.*or ask for fewer"):
        generate(tmp_path, tiny)
    assert content(tmp_path) == {}


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write ListOps data to .*file/data: Not a directory; make room, or"):
        generate(tmp_path / "file" / "data", PRESET)


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot write ListOps data to .*data: No space left on device; make room"):
        generate(tmp_path / "data", PRESET)
    assert content(tmp_path / "data") == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"generator": {"longer_than": 7}},
            "generator must have the keys longer_than, shorter_than, .*got longer_than",
        ),
        ({"max_length": 31}, "shorter_than = 33 lets expressions be longer than max_length = 31"),
        ({"generator": {**PRESET.generator, "max_args": 1}}, "max_args must be from 2 to 60, got 1"),
    ],
)
def test_a_preset_that_makes_no_sense_is_an_error(tmp_path: Path, changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, replace(PRESET, **changes))


def test_seed_and_workers_are_checked(tmp_path: Path):
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        generate(tmp_path, PRESET, seed=-1)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        generate(tmp_path, PRESET, workers=0)
