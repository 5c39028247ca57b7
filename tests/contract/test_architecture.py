"""The shape of the house: registration, docstrings, sizes, and what an import loads."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import subquad
from subquad.build import list_feedforwards, list_mixers
from subquad.registry import FEEDFORWARDS, MIXERS

PACKAGE = Path(subquad.__file__).parent
TESTS = Path(__file__).parents[1]
MECHANISMS = sorted(path for path in (PACKAGE / "mechanisms").glob("*.py") if path.stem != "__init__")
CHANNEL_MIXERS = sorted(path for path in (PACKAGE / "feedforward").glob("*.py") if path.stem != "__init__")
SOURCES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 300
MOST_FUNCTION_LINES = 60


def label(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", [*MECHANISMS, *CHANNEL_MIXERS], ids=label)
def test_a_file_registers_one_mechanism_under_its_own_name(path: Path) -> None:
    registry = MIXERS if path in MECHANISMS else FEEDFORWARDS
    module = f"subquad.{path.parent.name}.{path.stem}"
    assert [name for name, found in registry.items() if found.__module__ == module] == [path.stem]
    assert registry.lookup(path.stem).name == path.stem


def test_the_registry_holds_nothing_but_the_files() -> None:
    assert list_mixers() == [path.stem for path in MECHANISMS]
    assert list_feedforwards() == [path.stem for path in CHANNEL_MIXERS]


@pytest.mark.parametrize("path", MECHANISMS, ids=label)
def test_a_mechanism_has_its_own_test(path: Path) -> None:
    assert (TESTS / "mechanisms" / f"test_{path.stem}.py").is_file()


@pytest.mark.parametrize("path", CHANNEL_MIXERS, ids=label)
def test_a_channel_mixer_has_its_own_test(path: Path) -> None:
    assert (TESTS / "feedforward" / f"test_{path.stem}.py").is_file()


@pytest.mark.parametrize("path", [*MECHANISMS, *CHANNEL_MIXERS], ids=label)
def test_a_docstring_names_paper_formula_cost_and_departures(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", text)
    assert re.search(r"\n\n    \S", text), "a formula block, indented by four spaces"
    assert re.search(r"^Cost ", text, re.MULTILINE)
    assert re.search(r"^Departures: ", text, re.MULTILINE)


@pytest.mark.parametrize("name", list_mixers())
def test_a_mechanism_belongs_to_a_known_family(name: str) -> None:
    families = {"dense", "sparse", "factorised", "recurrent", "attention-free", "conditional"}
    assert MIXERS.lookup(name).family in families


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_a_file_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_functions_are_short(path: Path) -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, functions)]
    lines = {(node.name, node.lineno): (node.end_lineno or 0) - node.lineno + 1 for node in nodes}
    assert {place: count for place, count in lines.items() if count > MOST_FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_a_file_opens_with_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("statement", ["import subquad", "import subquad.records, subquad.report"])
def test_an_import_does_not_load_torch(statement: str) -> None:
    program = f"import sys; {statement}; print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("part", ["records", "report"])
def test_no_module_of_records_and_report_loads_torch(part: str) -> None:
    modules = [f"subquad.{part}.{path.stem}" for path in (PACKAGE / part).glob("*.py") if path.stem != "__init__"]
    program = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_every_public_name_resolves() -> None:
    names = [name for name in dir(subquad) if not name.startswith("_")]
    assert {"build_mixer", "Mask", "State", "receipts", "models", "ops", "register"} <= set(names)
    for name in names:
        assert getattr(subquad, name) is not None


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'subquad' has no attribute 'build_mixr'"):
        importlib.import_module("subquad").build_mixr  # noqa: B018 - the access is what fails
