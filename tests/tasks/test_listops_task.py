import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from subquad.tasks import listops
from subquad.tasks.base import DataPreset
from subquad.tasks.listops import ListopsTask, evaluate
from subquad.tasks.listops_manifest import Recipe
from subquad.tasks.registry import list_tasks, load_task

PRESETS = Path(__file__).parents[2] / "subquad" / "presets" / "listops"
TINY = DataPreset(
    name="tiny",
    title="tiny ListOps",
    is_lra=False,
    train=50,
    validation=10,
    test=10,
    max_length=32,
    generator={"longer_than": 7, "shorter_than": 33, "max_depth": 3, "max_args": 5},
)


def load_preset(name: str) -> DataPreset:
    return DataPreset.from_table(name, tomllib.loads((PRESETS / f"{name}.toml").read_text())["data"])


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that data was generated in, in order."""
    folders: list[Path] = []

    def counting(directory: Path, *args: DataPreset, **options: int) -> object:
        folders.append(directory)
        return original(directory, *args, **options)

    original = listops.generate
    monkeypatch.setattr(listops, "generate", counting)
    return folders


def test_data_is_generated_once(tmp_path: Path, generations: list[Path]):
    first, second = (ListopsTask().prepare(tmp_path / "data", TINY) for _ in range(2))
    assert generations == [tmp_path / "data"]
    assert first.data_hash == second.data_hash
    assert (first.name, first.preset, first.title, first.is_lra) == ("listops", "tiny", "tiny ListOps", False)
    assert [len(split) for split in (first.train, first.validation, first.test)] == [50, 10, 10]


def test_labels_are_the_values_of_the_expressions(tmp_path: Path):
    data = ListopsTask().prepare(tmp_path, TINY)
    assert [evaluate(tokens) for tokens in data.train.inputs] == data.train.labels.tolist()


def test_another_seed_or_number_is_generated_anew(tmp_path: Path, generations: list[Path]):
    hashes = {
        ListopsTask().prepare(tmp_path, TINY).data_hash,
        ListopsTask().prepare(tmp_path, TINY, seed=1).data_hash,
        ListopsTask().prepare(tmp_path, replace(TINY, train=51)).data_hash,
    }
    assert len(generations) == len(hashes) == 3


def test_a_damaged_file_is_generated_anew(tmp_path: Path, generations: list[Path]):
    data = ListopsTask().prepare(tmp_path, TINY)
    path = tmp_path / "basic_test.tsv"
    path.write_bytes(path.read_bytes().replace(b"MIN", b"MAX", 1))
    assert ListopsTask().prepare(tmp_path, TINY).data_hash == data.data_hash
    assert len(generations) == 2


def test_files_that_were_not_generated_here_are_never_replaced(tmp_path: Path, generations: list[Path]):
    ListopsTask().prepare(tmp_path, TINY)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match=r"holds basic_train\.tsv, .* not generated here .* read them as your own data"
    ):
        ListopsTask().prepare(tmp_path, TINY, seed=1)
    assert len(generations) == 1
    assert len(ListopsTask().read(tmp_path, TINY).train) == 50


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"recipe": {}, "files": []}', '{"recipe": 3, "files": 4}'])
def test_a_manifest_that_cannot_be_read_is_an_error(tmp_path: Path, content: str):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"cannot read .*manifest\.json .*: delete the folder"):
        ListopsTask().prepare(tmp_path, TINY)


def test_paper_and_release_are_the_published_data():
    paper, release = load_preset("paper"), load_preset("release")
    assert Recipe.from_preset(paper, 0) == Recipe.from_preset(release, 0)
    assert (paper.train, paper.validation, paper.test, paper.max_length) == (96_000, 2_000, 2_000, 2_000)
    assert paper.generator == {"longer_than": 500, "shorter_than": 2000, "max_depth": 10, "max_args": 10}
    assert paper.is_lra


def test_small_differs_from_the_published_data_in_numbers_only():
    small = load_preset("small")
    assert small.generator == load_preset("paper").generator
    assert small.is_lra
    assert "20,000" in small.title


def test_quick_says_that_it_is_not_long_range_arena():
    quick = load_preset("quick")
    assert not quick.is_lra
    assert "not Long Range Arena" in quick.title


def test_quick_has_enough_different_expressions(tmp_path: Path):
    quick = load_preset("quick")
    data = ListopsTask().prepare(tmp_path, quick)
    assert len(data.train) == quick.train
    assert data.train.lengths.max() <= quick.max_length


def test_tasks_load_by_name():
    assert {name: load_task(name).name for name in list_tasks()} == {name: name for name in list_tasks()}
    assert isinstance(load_task("listops"), ListopsTask)
    with pytest.raises(ValueError, match=r"unknown task 'listop'; did you mean 'listops'\? Known: copy, "):
        load_task("listop")
    with pytest.raises(ValueError, match="unknown task 'xyz'; known: copy, duplicate, image-lm, listops, "):
        load_task("xyz")


def test_tasks_do_without_torch():
    code = "import subquad.tasks.registry, sys; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PRESETS.parents[1], timeout=60).returncode == 0
