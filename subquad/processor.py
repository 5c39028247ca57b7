"""This machine's processor, as the operating system tells it."""

from __future__ import annotations

import platform
import re
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
"""Linux has it; elsewhere Python's `platform` tells a little."""

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""Those that matter for products of matrices."""


def cpu_name() -> str:
    """The processor's name.

    A name without a number, as virtual machines show it, tells no generation, and gets that of its family and model.
    """
    facts = _facts()
    name = re.sub(r"\s+", " ", re.sub(r"\((R|TM)\)|CPU|@.*", "", facts.get("model name", ""))).strip()
    if not name:
        return platform.processor() or platform.machine() or "unknown processor"
    if re.search(r"\d", name) or not {"cpu family", "model"} <= facts.keys():
        return name
    return f"{name} family {facts['cpu family']} model {facts['model']}"


def instruction_sets() -> list[str]:
    """What it offers of `INSTRUCTION_SETS`; empty where that isn't told."""
    facts = _facts()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return [name for name in INSTRUCTION_SETS if name in flags]


@cache
def made_by_intel() -> bool:
    """Whether Intel made it: some libraries run their best code on such processors alone."""
    return "GenuineIntel" in (_facts().get("vendor_id") or platform.processor())


def _facts() -> dict[str, str]:
    """What is told of the first processor; empty where there is no such file."""
    if not CPUINFO.exists():
        return {}
    lines = CPUINFO.read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
