from pathlib import Path

import pytest
import torch
from command_line import Invoke

from subquad.cli import machine
from subquad.cli.machine import Check, Level, load_check, version_fits


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "matmul_flops_per_second", lambda size: 56.4e9)


def test_the_document_holds_every_check(tmp_path: Path, invoke: Invoke) -> None:
    ran = invoke("doctor", "--output", str(tmp_path), "--json")
    found = {check["name"]: check for check in ran.document["checks"]}
    assert ran.exit_code == 0
    assert ran.document["healthy"] is True
    assert found["torch"]["found"] == torch.__version__
    assert found["matrix product"]["found"] == "56.4 GFLOP/s in float32 (1024 x 1024, median)"
    assert {"processor", "cores", "memory", "accelerator", "load", "transformers", "folder"} <= set(found)
    assert found["folder"]["level"] == "good"


def test_the_output_folder_is_not_made(tmp_path: Path, invoke: Invoke) -> None:
    assert "made when needed" in " ".join(invoke("doctor", "--output", str(tmp_path / "new")).out.split())
    assert list(tmp_path.iterdir()) == []


def test_something_broken_is_red_with_a_remedy_and_exit_code_1(invoke: Invoke) -> None:
    ran = invoke("doctor", "--output", "/proc/nowhere")
    assert ran.exit_code == 1
    assert "✗  folder" in ran.out
    assert "Name a folder that you can write with --output." in ran.out
    assert "1 to repair, see the red lines." in ran.out
    assert invoke("doctor", "--output", "/proc/nowhere", "--json").document["healthy"] is False


def test_a_missing_package_names_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    monkeypatch.setattr(machine, "installed_version", lambda package: "not installed")
    ran = invoke("doctor", "--output", str(tmp_path))
    assert ran.exit_code == 1
    assert "transformers<6,>=5.23 is needed: pip install --upgrade 'subquad[models]'" in ran.out
    assert "torch>=2.13 is needed: pip install --upgrade subquad" in ran.out


def test_a_missing_package_that_few_tasks_need_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    missing = ("pyarrow", "scikit-learn")
    monkeypatch.setattr(machine, "installed_version", lambda package: "" if package in missing else "999")
    monkeypatch.setattr(machine, "required_version", lambda package: "")
    ran = invoke("doctor", "--output", str(tmp_path), "--json")
    found = {check["name"]: check for check in ran.document["checks"]}
    assert ran.exit_code == 0
    for package in missing:
        assert found[package]["level"] == "warning"
        expected = (
            f"{package} is needed for Parquet files and the digits of image-lm: pip install --upgrade 'subquad[data]'"
        )
        assert found[package]["remedy"] == expected


def test_a_busy_machine_is_a_warning() -> None:
    assert load_check(0.3, 2).level is Level.GOOD
    busy = load_check(1.7, 2)
    assert busy.level is Level.WARNING
    assert busy.remedy.startswith("The machine is busy: figures of speed will be too low.")
    assert busy == Check("Machine", "load", Level.WARNING, busy.found, busy.remedy)


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.13", True),
        ("2.9.1", ">=2.13", False),
        ("6.0.0", "<6,>=5.23", False),
        ("5.23.0", "<6,>=5.23", True),
        ("5.100", "<6,>=5.23", True),
        ("1.0rc1", "", True),
        ("not installed", "", False),
    ],
)
def test_versions_are_compared_as_numbers(version: str, wanted: str, fits: bool) -> None:
    assert version_fits(version, wanted) is fits
