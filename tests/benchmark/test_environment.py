import os
import subprocess
from pathlib import Path

import pytest
import torch

import subquad
from subquad.benchmark.environment import commit, hardware_name, installed_version, this_environment


def test_the_environment_is_that_of_this_process() -> None:
    found = this_environment()
    assert found.threads == torch.get_num_threads()
    assert found.torch == torch.__version__
    assert found.subquad == subquad.__version__
    assert found.hardware == hardware_name()
    assert found.memory_bytes > 0


def test_another_number_of_threads_is_another_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert hardware_name().endswith("-7-threads")


def test_an_accelerator_is_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert hardware_name() == "nvidia-h200"
    assert this_environment().accelerator == "NVIDIA H200"


def test_a_package_that_is_not_there_says_so() -> None:
    assert installed_version("no-such-package-anywhere") == "not installed"
    assert installed_version("torch").startswith("2.")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "subquad").mkdir()
    (tmp_path / "subquad" / "__init__.py").write_text("")
    monkeypatch.setattr(subquad, "__file__", str(tmp_path / "subquad" / "__init__.py"))
    return tmp_path


def test_the_commit_says_whether_files_differ_from_it(checkout: Path) -> None:
    assert commit() is None
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", *arguments], cwd=checkout, check=True, env={**os.environ, "HOME": str(checkout)})
    clean = commit()
    assert clean is not None
    assert len(clean) == 12
    (checkout / "subquad" / "__init__.py").write_text("changed = True")
    assert commit() == f"{clean}-dirty"


def test_without_git_there_is_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / ".git").mkdir()
    assert commit() is None
    monkeypatch.setenv("PATH", "")
    assert commit() is None
