"""`import subquad` is light: names resolve on first use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import subquad


def loaded_after(program: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after a program."""
    tail = "print(*({'torch', 'transformers', 'numpy', 'pydantic', 'plotly'} & set(sys.modules)))"
    command = [sys.executable, "-c", f"import sys\n{program}\n{tail}"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_import_loads_nothing_heavy() -> None:
    assert loaded_after("import subquad; subquad.__version__; dir(subquad)") == set()


def test_prices_are_arithmetic_and_need_no_torch() -> None:
    assert loaded_after("import subquad; subquad.Cost(flops=1) + subquad.Cost()") == set()
    assert loaded_after("import subquad.costs, subquad.receipt, subquad.config, subquad.registry") == set()


def test_mixers_load_torch_and_not_transformers() -> None:
    loaded = loaded_after("import subquad; subquad.build_mixer('full', embed_dim=8, num_heads=2)")
    assert "torch" in loaded
    assert not loaded & {"transformers", "pydantic", "plotly"}


@pytest.mark.parametrize("name", ["models", "ops", "patterns"])
def test_a_subpackage_loads_on_first_use(name: str) -> None:
    assert "torch" in loaded_after(f"import subquad; subquad.{name}.__name__")


def test_the_package_is_typed() -> None:
    assert (Path(subquad.__file__).parent / "py.typed").is_file()
