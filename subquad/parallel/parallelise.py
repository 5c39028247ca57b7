"""A model on many processes: what each layer keeps here, and what it gathers when it runs.

    experts                         X / n of them in a row, F / m hidden channels of each on a process; never gathered
    heads, hidden channels          1 / m on a process, of that 1 / n between steps
    everything else                 the same on the m processes of a row, 1 / n on each between steps

A layer gathers its dense part over the n rows before it runs, forward and backward, and its gradients are averaged over
them and scattered (`fully_shard`, Zhao et al. 2023, "PyTorch FSDP", arXiv:2304.11277).

All losses are means over the part of the batch that a process has; the gradient is that of the mean over the parts.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from subquad.parallel.check import blocks_of, check_model, dense_mixers_of, experts_of
from subquad.parallel.expert_exchange import ShardedExperts
from subquad.parallel.grid import DATA, MODEL, grid_of
from subquad.parallel.tensor_parallel import part_mixer


def parallelise(model: nn.Module, mesh: DeviceMesh) -> None:
    """Keep this process's part of a model; afterwards it is called and trained as before.

    Args:
        model: equal on all processes: built from the same seed, or loaded from the same file. Changed in place; the
            names of its parameters and their whole shapes stay.
        mesh: (data, model), from `make_mesh`.

    Raises:
        ValueError: a model that doesn't fit the mesh; see `check_model`.
    """
    check_model(model, grid_of(mesh))
    experts: set[nn.Parameter] = set()
    blocks = blocks_of(model)
    for block in blocks:
        if mesh[MODEL].size() > 1:
            for mixer in dense_mixers_of(block):
                part_mixer(mixer, mesh[MODEL])
        for mixer in experts_of(block):
            mixer.experts = ShardedExperts(mixer.experts, mesh)
            experts.update(mixer.experts.parameters())
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh[DATA], ignored_params=experts)
