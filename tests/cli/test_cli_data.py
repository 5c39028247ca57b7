import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import pytest
from command_line import Invoke

from subquad.benchmark.data import data_directory
from subquad.cli.options import TaskOption
from subquad.tasks.registry import list_tasks, load_task
from subquad.training.presets import load_preset


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of the quick preset, generated once."""
    directory = tmp_path_factory.mktemp("listops")
    load_task("listops").prepare(directory, load_preset("listops", "quick").data)
    return directory


def test_the_document_holds_the_facts_of_the_data(quick: Path, invoke: Invoke) -> None:
    ran = invoke("data", "--data", str(quick), "--json")
    data = load_task("listops").read(quick, load_preset("listops", "quick").data)
    assert ran.exit_code == 0
    assert ran.document["data_hash"] == data.data_hash
    assert ran.document["guess"] == asdict(data.guess())
    assert (ran.document["objective"], ran.document["num_labels"]) == ("classification", 10)
    for name, split in data.splits.items():
        facts = ran.document["splits"][name]
        assert facts["examples"] == len(split) == sum(facts["labels"].values())
        assert (facts["shortest"], facts["longest"]) == (split.lengths.min(), split.lengths.max())
    assert ran.document["files"]["basic_test.tsv"] == (quick / "basic_test.tsv").stat().st_size


def test_the_table_is_on_standard_output_and_progress_on_standard_error(quick: Path, invoke: Invoke) -> None:
    ran = invoke("data", "--data", str(quick))
    assert "not Long Range Arena" in ran.out
    assert str(quick) in ran.out.replace("\n", "")
    assert "always answers" in ran.out
    assert ran.err.splitlines()[0] == "preparing listops, quick ..."
    assert ran.err.splitlines()[1].startswith("✓ preparing listops, quick")
    assert "22,000 examples" in ran.err


@pytest.mark.parametrize("verb", ["compare", "data"])
def test_help_names_every_task(verb: str, invoke: Invoke) -> None:
    described = re.search(r"The task: (.+?)\.", re.sub(r"[\s│]+", " ", invoke(verb, "--help").out))
    assert described is not None
    assert re.split(r", | or ", described[1]) == list_tasks()


def test_the_default_folder_is_the_one_that_compare_uses(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = data_directory(Path("subquad-results"), load_preset("listops", "quick"))
    assert expected == Path("subquad-results/data/listops/quick")
    shutil.copytree(quick, expected)
    assert invoke("data", "--json").document["directory"] == str(tmp_path / expected)
    (tmp_path / "subquad-results").rename(tmp_path / "elsewhere")
    moved = invoke("data", "--output", "elsewhere", "--check", "--json").document["directory"]
    assert moved == str(tmp_path / "elsewhere/data/listops/quick")


def test_files_of_the_users_own_are_checked_and_never_replaced(quick: Path, tmp_path: Path, invoke: Invoke) -> None:
    for name in ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv"):
        shutil.copy(quick / name, tmp_path / name)
    refused = invoke("data", "--data", str(tmp_path))
    assert refused.exit_code == 2
    assert "that were not generated here" in refused.err
    assert "✗ preparing listops, quick" in refused.err
    checked = invoke("data", "--data", str(tmp_path), "--check", "--json")
    assert checked.document["splits"]["train"]["examples"] == 20_000


def test_a_task_without_examples_reads_the_folder_that_its_error_asks_for(tmp_path: Path, invoke: Invoke) -> None:
    refused = invoke("data", "--task", "text")
    assert refused.exit_code == 2
    assert "name yours with --data PATH" in refused.err
    for label in ("yes", "no"):
        (tmp_path / label).mkdir()
        for index in range(30):
            (tmp_path / label / f"{index}.txt").write_text(f"{label} {index}")
    for option in ("--data", "--data"):
        ran = invoke("data", "--task", "text", option, str(tmp_path), "--json")
        assert sum(split["examples"] for split in ran.document["splits"].values()) == 60


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--task", "listop"], "unknown task 'listop'; did you mean 'listops'?"),
        (["--preset", "qick"], "unknown preset 'qick' of task 'listops'; did you mean 'quick'?"),
        (["--workers", "0"], "invalid value for '--workers'"),
        (["--data", "nowhere", "--check"], "no ListOps data in nowhere"),
    ],
)
def test_what_can_not_be_had_says_why(arguments: list[str], text: str, invoke: Invoke) -> None:
    ran = invoke("data", *arguments)
    assert ran.exit_code == 2
    assert ran.out == ""
    assert text in ran.err


def test_the_help_of_the_option_names_every_task() -> None:
    (option,) = get_args(TaskOption)[1:]
    named = re.findall(r"[a-z]+(?:-[a-z]+)*", option.help.partition(":")[2])
    assert [name for name in named if name != "or"] == list_tasks()
