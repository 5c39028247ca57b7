"""Settings that all tests share."""

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


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test draws the same numbers, alone or among others."""
    import torch

    torch.manual_seed(0)
