"""Running the command line inside the test, as `main` runs it, and a folder of made-up results."""

import importlib
import sys
from pathlib import Path

import pytest
from command_line import Invoke, Ran

from subquad.cli.main import main


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> Ran:
        capsys.readouterr()
        exit_code = main(arguments)
        captured = capsys.readouterr()
        return Ran(exit_code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up results of the report's tests."""
    folder = str(Path(__file__).parents[1] / "report")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("synthetic_results").write_results(tmp_path_factory.mktemp("results"))
    finally:
        sys.path.remove(folder)
