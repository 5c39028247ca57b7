"""This machine and its software, as every record keeps them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import subquad
from subquad.processor import cpu_name
from subquad.records.schema import Environment
from subquad.records.store import slug


def this_environment() -> Environment:
    """What the measurements of this process depend on."""
    return Environment(
        hardware=hardware_name(),
        cpu=cpu_name(),
        accelerator=_accelerator(),
        threads=torch.get_num_threads(),
        memory_bytes=memory_bytes(),
        operating_system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=installed_version("transformers"),
        subquad=subquad.__version__,
        commit=commit(),
    )


def hardware_name() -> str:
    """What the folder of this machine's records is called: its accelerator, or processor and threads."""
    accelerator = _accelerator()
    return slug(f"{cpu_name()}-{torch.get_num_threads()}-threads" if accelerator is None else accelerator)


def _accelerator() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def memory_bytes() -> int:
    """Physical memory; 0 where the operating system doesn't tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def installed_version(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str | None:
    """The commit of the checkout that subquad runs from, marked if files differ from it; None outside a checkout."""
    root = Path(subquad.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(describe, cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
