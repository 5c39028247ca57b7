"""The grid of processes."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from processes import run_on

from subquad.parallel.grid import DATA, MODEL, Grid, grid_of, make_mesh


def test_a_world_is_arranged_in_rows() -> None:
    assert Grid.of_world(6, model=2) == Grid(3, 2)
    assert Grid.of_world(4).processes == 4


@pytest.mark.parametrize(("world_size", "model"), [(3, 2), (2, 4), (4, 0)])
def test_rows_that_cannot_be_filled_are_refused(world_size: int, model: int) -> None:
    with pytest.raises(ValueError, match=f"{world_size} processes can't be arranged in rows of {model}"):
        Grid.of_world(world_size, model=model)


def places() -> tuple[int, int, int, int]:
    mesh = make_mesh(Grid(2, 2))
    assert grid_of(mesh) == Grid(2, 2)
    return dist.get_rank(), mesh.get_local_rank(DATA), mesh.get_local_rank(MODEL), mesh.get_group(MODEL).size()


def test_the_processes_of_a_row_are_neighbours() -> None:
    assert run_on(4, places) == [(0, 0, 0, 2), (1, 0, 1, 2), (2, 1, 0, 2), (3, 1, 1, 2)]
