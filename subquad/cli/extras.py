"""Which optional packages subquad can use, and which extra installs each; read from subquad's own metadata."""

from __future__ import annotations

import importlib.metadata
import re

_IMPORT_NAMES = {"PIL": "pillow", "sklearn": "scikit-learn"}
"""Modules that are called otherwise than their package."""

_EXTRAS_OF_USERS = ("models", "cli", "data")
"""The extras for using subquad; the others are for working on it."""


def optional_packages() -> dict[str, str]:
    """Package name to the extra that installs it; empty where subquad itself is not installed as a package."""
    try:
        requirements = importlib.metadata.requires("subquad") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {}
    for requirement in requirements:
        match = re.match(r"([A-Za-z0-9._-]+).*;\s*extra\s*==\s*['\"](\w+)['\"]", requirement)
        if match and match[2] in _EXTRAS_OF_USERS:
            found[match[1].lower()] = match[2]
    return found


def required_version(package: str) -> str:
    """The version range that subquad asks of a package, as `>=5.23,<6`; "" for any."""
    for requirement in importlib.metadata.requires("subquad") or []:
        match = re.match(rf"{re.escape(package)}\s*([<>=!~][^;]*)?(;|$)", requirement, re.IGNORECASE)
        if match:
            return (match[1] or "").strip()
    return ""


def extra_of_module(module: str) -> str | None:
    """The extra that brings a top-level module which could not be imported, or None if none does."""
    return optional_packages().get(_IMPORT_NAMES.get(module, module).lower())
