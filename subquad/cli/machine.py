"""What `subquad doctor` looks at: this machine, this installation, and the folder that results will go to.

Every check is a line: good, a warning, or bad, what was found, and what to do about it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

from subquad.benchmark.environment import installed_version, memory_bytes
from subquad.benchmark.timing import matmul_flops_per_second
from subquad.cli.cores import cores
from subquad.cli.extras import optional_packages, required_version
from subquad.processor import cpu_name, instruction_sets
from subquad.records import units

MATRIX_SIZE = 1024
LOWEST_FREE_BYTES = 2_000_000_000
LOWEST_MEMORY_BYTES = 4_000_000_000
_READ_WITH_DATA = "Parquet files and the digits of image-lm"
"""What the extra `data` is for: all else runs without it."""


class Level(StrEnum):
    """How a check ended."""

    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it ended, what was found and what to do ("" where nothing is)."""

    subject: str
    name: str
    level: Level
    found: str
    remedy: str = ""


def _judged(subject: str, name: str, good: bool, found: str, remedy: str, otherwise: Level = Level.WARNING) -> Check:
    return Check(subject, name, Level.GOOD, found) if good else Check(subject, name, otherwise, found, remedy)


def checks(output: Path) -> tuple[Check, ...]:
    """Every check, in the order of the lines; takes about a second."""
    return (
        _processor(),
        _threads(),
        _memory(),
        Check("Machine", "accelerator", Level.GOOD, accelerator()),
        Check("Machine", "instructions", Level.GOOD, ", ".join(instruction_sets()) or "not told"),
        _load(),
        _speed(),
        _python(),
        _package("torch", None),
        *(_package(package, extra) for package, extra in optional_packages().items()),
        _compiler(),
        *_output(output),
    )


def accelerator() -> str:
    """The CUDA device, or that there is none."""
    if not torch.cuda.is_available():
        return "none: everything runs on the CPU"
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{device.name}, {units.size(device.total_memory)}"


def _processor() -> Check:
    return Check("Machine", "processor", Level.GOOD, cpu_name())


def _threads() -> Check:
    threads = torch.get_num_threads()
    found = f"{cores()} for this process, of {os.cpu_count()}; torch uses {threads} threads"
    remedy = "More threads than cores slow each other down: unset OMP_NUM_THREADS, or lower it."
    return _judged("Machine", "cores", threads <= cores(), found, remedy)


def _memory() -> Check:
    total, free = memory_bytes(), _available_bytes()
    found = f"{units.size(total)}" + ("" if free is None else f", {units.size(free)} available")
    remedy = "Long sequences will run out of memory: close other programs, or keep to the preset quick."
    return _judged("Machine", "memory", (free or total) >= LOWEST_MEMORY_BYTES, found, remedy)


def _available_bytes() -> int | None:
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else None


def _load() -> Check:
    try:
        busy = os.getloadavg()[0]
    except OSError:
        return Check("Machine", "load", Level.GOOD, "not told by this system")
    return load_check(busy, cores())


def load_check(busy: float, cores: int) -> Check:
    """Whether a machine with `cores` is quiet enough to measure on; `busy` is the average number of running tasks."""
    found = f"{busy:.2f} running tasks on average in the last minute, {cores} cores"
    remedy = "The machine is busy: figures of speed will be too low. Wait, or stop other work, before measuring."
    return _judged("Machine", "load", busy <= max(0.5, 0.25 * cores), found, remedy)


def _speed() -> Check:
    rate = matmul_flops_per_second(MATRIX_SIZE) / 1e9
    found = f"{rate:,.1f} GFLOP/s in float32 ({MATRIX_SIZE} x {MATRIX_SIZE}, median)"
    return Check("Machine", "matrix product", Level.GOOD, found)


def _python() -> Check:
    good = sys.version_info >= (3, 11)
    return _judged("Software", "python", good, platform.python_version(), "Install Python 3.11 or newer.", Level.BAD)


def _package(package: str, extra: str | None) -> Check:
    version, wanted = installed_version(package), required_version(package)
    name = f"'subquad[{extra}]'" if extra else "subquad"
    users, otherwise = ("", Level.BAD) if extra != "data" else (f" for {_READ_WITH_DATA}", Level.WARNING)
    remedy = f"{package}{wanted} is needed{users}: pip install --upgrade {name}"
    return _judged("Software", package, version_fits(version, wanted), version, remedy, otherwise)


def version_fits(version: str, wanted: str) -> bool:
    """Whether an installed version is in a range such as `>=5.23,<6`; "not installed" is in none."""
    if not version[:1].isdigit():
        return False
    comparisons: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
        ">=": lambda a, b: a >= b,
        "<": lambda a, b: a < b,
    }
    ranges = re.findall(r"(>=|<)\s*([\d.]+)", wanted)
    return all(comparisons[sign](_numbers(version), _numbers(bound)) for sign, bound in ranges)


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"[\d.]+", version)
    return tuple(int(number) for number in (release[0] if release else "0").strip(".").split("."))


def _compiler() -> Check:
    found = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    remedy = "Nothing needs one but torch.compile and its fused attention on the CPU."
    return _judged("Software", "C++ compiler", found is not None, found or "none", remedy)


def _output(output: Path) -> tuple[Check, ...]:
    folder = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    enough = "Free some space, or name another folder with --output."
    return (
        _writable(output, folder),
        _judged("Results", "free disk", free >= LOWEST_FREE_BYTES, units.size(free), enough),
    )


def _writable(output: Path, folder: Path) -> Check:
    remedy = "Name a folder that you can write with --output."
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"subquad")
    except OSError as error:
        return Check("Results", "folder", Level.BAD, f"cannot write {folder}: {error.strerror or error}", remedy)
    new = "" if output.exists() else ", made when needed"
    return Check("Results", "folder", Level.GOOD, f"{output.absolute()} can be written{new}")
