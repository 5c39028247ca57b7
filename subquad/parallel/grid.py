"""The grid of processes: so many parts of the batch, times so many parts of every layer.

Fedus et al. 2021, "Switch Transformers", arXiv:2101.03961, section 5: of N = n m processes, n rows have each a part of
the batch and, of every layer with experts, a part of the experts; the m processes of a row have the same part of both,
and share heads and hidden channels.

    rank = data rank · m + model rank

so that the processes of a row, which talk most, are neighbours on a machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DATA, MODEL = "data", "model"
"""Names of the dimensions of the mesh."""


@dataclass(frozen=True)
class Grid:
    """Sizes of the grid.

    Attributes:
        data: n, parts of the batch and of the experts.
        model: m, parts of heads and hidden channels.
    """

    data: int
    model: int = 1

    @classmethod
    def of_world(cls, world_size: int, *, model: int = 1) -> Grid:
        """The grid of `world_size` processes with `model` of them in a row.

        Raises:
            ValueError: rows that can't be filled.
        """
        if model < 1 or world_size < 1 or world_size % model:
            raise ValueError(
                f"{world_size} processes can't be arranged in rows of {model} that share a layer; start a multiple of "
                f"{model}, or choose a divisor of {world_size}"
            )
        return cls(world_size // model, model)

    @property
    def processes(self) -> int:
        """N."""
        return self.data * self.model


def make_mesh(grid: Grid, device_type: str = "cpu") -> DeviceMesh:
    """The device mesh (data, model) over the process group, which must be there already.

    Raises:
        RuntimeError: a process group of another size.
    """
    return init_device_mesh(device_type, (grid.data, grid.model), mesh_dim_names=(DATA, MODEL))


def grid_of(mesh: DeviceMesh) -> Grid:
    """The sizes of a mesh."""
    return Grid(mesh[DATA].size(), mesh[MODEL].size())
