"""What the operating system tells of the processor."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from subquad import processor
from subquad.processor import cpu_name, instruction_sets, made_by_intel


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    made_by_intel.cache_clear()
    yield
    made_by_intel.cache_clear()


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("Intel(R) Xeon(R) CPU E5-2670 @ 2.60GHz", "Intel Xeon E5-2670"),
        ("AMD EPYC", "AMD EPYC family 25 model 1"),  # two generations share this name, and their figures no table
        ("AMD EPYC 7B13", "AMD EPYC 7B13"),
    ],
)
def test_the_processors_name_has_no_ornaments_and_tells_its_generation(
    told: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = f"processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: {told}\n"
    (tmp_path / "cpuinfo").write_text(f"{first}\n{first.replace('25', '26')}")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu_name() == name


@pytest.mark.parametrize(("vendor", "intel"), [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_linux_names_the_maker_and_the_vectors(
    vendor: str, intel: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\nflags\t\t: fpu avx2 avx512f\n")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    assert made_by_intel() is intel
    assert instruction_sets() == ["avx2", "avx512f"]


@pytest.mark.parametrize(("told", "intel"), [("Intel64 Family 6 Model 85, GenuineIntel", True), ("arm", False)])
def test_elsewhere_python_names_the_maker(
    told: str, intel: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "missing")
    monkeypatch.setattr(platform, "processor", lambda: told)
    assert made_by_intel() is intel
    assert cpu_name() == told
    assert instruction_sets() == []
