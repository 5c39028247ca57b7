"""What is generated from the registry is up to date, and what the documents show runs."""

import importlib
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from subquad.benchmark.mixers import parse_mixer
from subquad.benchmark.probes import run_probes
from subquad.build import make_dims
from subquad.patterns.expression import CONSTRUCTORS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def generator() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        yield importlib.import_module("generate")


@pytest.fixture(scope="module")
def generated(generator: ModuleType) -> dict[Path, str]:
    return generator.generated()


def python_blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)


def test_generated_files_are_up_to_date(generated):
    stale = [path.name for path, text in generated.items() if not path.exists() or path.read_text("utf-8") != text]
    assert not stale, f"run python docs/generate.py; out of date: {stale}"


@pytest.mark.parametrize(("folder", "ending"), [("mechanisms", "md"), ("feedforward", "md"), ("pictures", "svg")])
def test_nothing_is_left_of_what_is_gone(folder, ending, generated):
    expected = {path for path in generated if (ROOT / "docs" / folder) in path.parents}
    assert set((ROOT / "docs" / folder).rglob(f"*.{ending}")) == expected


def test_every_constructor_is_drawn_from_the_expression_that_stands_beside_its_picture(generator):
    text = (ROOT / "docs" / "patterns.md").read_text(encoding="utf-8").replace(r"\|", "|")
    drawn = [match["expression"] for match in generator.PATTERN_PICTURE.finditer(text)]
    assert {expression.partition("(")[0] for expression in drawn} >= set(CONSTRUCTORS)
    assert [expression for expression in drawn if f"`{expression}`" not in text] == []


def test_pages_of_sparse_mechanisms_show_their_picture(generator):
    page = generator.mechanism_page("local")
    assert "![Who attends whom in local](../pictures/mechanisms/local.svg)" in page
    assert "![" not in generator.mechanism_page("linear")


@pytest.mark.parametrize("document", ["README.md", "docs/concepts.md", "docs/parallel.md", "docs/patterns.md"])
def test_python_of_a_document_runs(document, tmp_path):
    torch.manual_seed(0)
    script = tmp_path / "example.py"
    script.write_text("\n".join(python_blocks(document)), encoding="utf-8")
    assert runpy.run_path(str(script))["subquad"]


def test_mechanism_of_the_contributing_guide_passes_every_probe(tmp_path):
    (block,) = python_blocks("CONTRIBUTING.md")
    path = tmp_path / "average.py"
    path.write_text(block, encoding="utf-8")
    config = parse_mixer(f"{path}:AverageConfig").config
    results = run_probes(config, make_dims(embed_dim=16, num_heads=2))
    assert [f"{r.name}: {r.detail}" for r in results if not r.passed] == []
    assert len(results) > 10


def test_the_definition_of_an_operation_stands_in_its_file_before_the_fast_form():
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "subquad" / "ops").rglob("*.py")}
    functions = {path: re.findall(r"^def (\w+)\(", text, re.MULTILINE) for path, text in texts.items()}
    home = {name: path for path, names in functions.items() for name in names}
    defined = {name.partition("_by_")[0]: name for name in home if "_by_" in name}
    operations = {fast: definition for fast, definition in defined.items() if fast in home}
    assert len(operations) > 15
    for fast, definition in operations.items():
        assert home[fast] == home[definition], f"{definition} is not where {fast} is"
        names = functions[home[fast]]
        assert names.index(definition) < names.index(fast), f"{home[fast].name}: {fast} stands before {definition}"
