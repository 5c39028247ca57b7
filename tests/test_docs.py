"""What is generated from the registry is up to date, and what the documents show runs."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch

from subquad.benchmark.mixers import parse_mixer
from subquad.benchmark.probes import run_probes
from subquad.build import make_dims

ROOT = Path(__file__).parents[1]


def load_generator():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python_blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)


def test_generated_files_are_up_to_date():
    stale = [path.name for path, text in load_generator().generated().items() if path.read_text("utf-8") != text]
    assert not stale, f"run python docs/generate.py; out of date: {stale}"


def test_no_page_is_left_of_a_mechanism_that_is_gone():
    expected = {path for path in load_generator().generated() if path.parent.name == "mechanisms"}
    assert set((ROOT / "docs" / "mechanisms").glob("*.md")) == expected


@pytest.mark.parametrize("document", ["README.md", "docs/concepts.md"])
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
