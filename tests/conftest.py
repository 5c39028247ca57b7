"""Settings that all tests share."""

import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

# The same examples on every machine and every run; a slow machine is no failure.
settings.register_profile("subquad", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("subquad")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors are slower on several threads, and workers share the cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def every_warning() -> None:
    """Torch warns once in a process: whether a test fails by it would depend on those that ran before."""
    import torch

    torch.set_warn_always(True)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test draws the same numbers, alone or among others."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def registry_as_it_was() -> Iterator[None]:
    """What a test registers, or loads from a user's file, is gone after it."""
    import subquad.build  # noqa: F401 - fills the registry
    from subquad.registry import FEEDFORWARDS, MIXERS

    before = [dict(registry._classes) for registry in (MIXERS, FEEDFORWARDS)]
    modules = set(sys.modules)
    yield
    for registry, classes in zip((MIXERS, FEEDFORWARDS), before, strict=True):
        registry._classes.clear()
        registry._classes.update(classes)
    for name in {name for name in sys.modules if name.startswith("subquad_user_")} - modules:
        del sys.modules[name]
