"""Experts on many processes: each row of the grid has some, and tokens travel to them and back.

Lepikhin et al. 2020, "GShard", arXiv:2006.16668; Fedus et al. 2021, arXiv:2101.03961, section 5. n rows of processes, m
processes in each, X experts of F hidden channels; a process has X / n experts, and F / m channels of each.

    rows sorted by expert -> counts to their processes -> rows to their processes -> sorted by expert again
    -> products -> Σ over the m processes -> rows back -> times their gates, into their tokens

Cost a row: D numbers to its expert and D back, on each of the m processes, and where they are several a sum of D
numbers; in the backward pass the same. A layer waits once for the counts. No row is padding, and none is dropped here:
what has no seat was left out before. The first of the m processes decides what goes where.

A process without rows takes part in every exchange. The gradient of an expert sums those of all n parts of the batch,
whose losses are averaged everywhere else, and is divided by n.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from subquad.layers.stacked_experts import StackedExperts
from subquad.ops.experts.grouped import ACTIVATIONS, ExpertWeights, experts
from subquad.ops.experts.routing import ExpertRows
from subquad.ops.precision import autocast_dtype
from subquad.parallel.collectives import enter_parts, exchange_counts, exchange_rows, scale_gradient, sum_parts
from subquad.parallel.grid import DATA, MODEL, Grid, grid_of
from subquad.parallel.randomness import apart

PLACEMENTS: dict[str, tuple[Placement, Placement]] = {
    "expand": (Shard(0), Shard(1)),
    "expand_bias": (Shard(0), Shard(1)),
    "contract": (Shard(0), Shard(2)),
    "contract_bias": (Shard(0), Replicate()),
}
"""Experts along the first dimension of the mesh, hidden channels along the second."""


class Exchange(NamedTuple):
    """Who sends how many rows to whom, seen by one process.

    Attributes:
        sent: rows to each process.
        received: rows from each process.
        arrived: the received rows, as rows of this process's experts.
    """

    sent: list[int]
    received: list[int]
    arrived: ExpertRows


def plan_exchange(counts: tuple[int, ...], group: dist.ProcessGroup, device: torch.device) -> Exchange:
    """Tell the processes of the group what comes.

    Args:
        counts: rows for each of the X experts, of which every process has the same number, in the order of ranks.
        group: the processes.
        device: where the numbers are sent from.
    """
    wanted = torch.tensor(counts, dtype=torch.int64, device=device).view(group.size(), -1)
    coming = exchange_counts(wanted, group)
    return Exchange(wanted.sum(dim=1).tolist(), coming.sum(dim=1).tolist(), arrived_rows(coming))


def rows_of_first(rows: ExpertRows, group: dist.ProcessGroup, device: torch.device) -> ExpertRows:
    """The rows that the first process of the group has found, which the others take over.

    All have found them from the same numbers; but where these differ by rounding, as they may on GPUs, a token could go
    one way on one process and another way on the next, and parts of different tokens would be summed.
    """
    counts = torch.tensor(rows.counts, dtype=torch.int64, device=device)
    dist.broadcast(counts, group=group, group_src=0)
    agreed = tuple(counts.tolist())
    places = torch.stack((rows.tokens, rows.choices))
    if group.rank() != 0:
        places = places.new_empty(2, sum(agreed))
    dist.broadcast(places, group=group, group_src=0)
    return ExpertRows(places[0], places[1], agreed, rows.dropped)


def arrived_rows(coming: Tensor) -> ExpertRows:
    """Rows sorted by the process that they come from, and of each by expert, as rows of the experts.

    Args:
        coming: int64 (n, experts of this process), how many.
    """
    own = torch.arange(coming.shape[1], device=coming.device).expand_as(coming)
    order = own.flatten().repeat_interleave(coming.flatten()).argsort(stable=True)
    return ExpertRows(order, torch.zeros_like(order), tuple(coming.sum(dim=0).tolist()), 0)


class ShardedExperts(StackedExperts):
    """This process's part of the experts, in the place of all of them; parameters are DTensors of the same names.

    Args:
        whole: all experts, equal on all processes.
        mesh: (data, model).
    """

    def __init__(self, whole: StackedExperts, mesh: DeviceMesh) -> None:
        count, hidden, width = whole.expand.shape
        with torch.device("meta"):
            super().__init__(count, width, hidden, activation=whole.activation, dropout=whole.dropout)
        self.grid: Grid = grid_of(mesh)
        self.model_rank = mesh.get_local_rank(MODEL)
        self.data_group, self.model_group = mesh.get_group(DATA), mesh.get_group(MODEL)
        for name, placements in PLACEMENTS.items():
            part = distribute_tensor(whole.get_parameter(name).detach(), mesh, placements, src_data_rank=None)
            self.register_parameter(name, nn.Parameter(part))

    def forward(self, x: Tensor, gates: Tensor, rows: ExpertRows) -> Tensor:
        """Tokens x (N, D) of this row of processes, to the experts of all; see `StackedExperts.forward`."""
        if self.grid.model > 1:
            rows = rows_of_first(rows, self.model_group, x.device)
        exchange = plan_exchange(rows.counts, self.data_group, x.device)
        leaving = x.to(autocast_dtype(x)).index_select(0, rows.tokens)
        arrived = exchange_rows(leaving, exchange.sent, exchange.received, self.data_group)
        y = self._compute(arrived, exchange.arrived)
        returned = exchange_rows(y, exchange.received, exchange.sent, self.data_group).to(x.dtype)
        gate = gates[rows.tokens, rows.choices].to(x.dtype)
        return torch.zeros_like(x).index_add(0, rows.tokens, returned * gate[:, None])

    def _compute(self, x: Tensor, rows: ExpertRows) -> Tensor:
        """Rows x (R, D) through this process's experts, all of their channels."""
        ones = torch.ones(x.shape[0], 1, dtype=x.dtype, device=x.device)
        activation, dropout = ACTIVATIONS[self.activation], self.dropout if self.training else 0.0
        if self.grid.model == 1:
            return experts(x, ones, self._weights(), rows, activation, dropout)
        x = enter_parts(x, self.model_group)
        if dropout:
            with apart(self.model_rank, x.device):
                y = experts(x, ones, self._weights(), rows, activation, dropout)
        else:
            y = experts(x, ones, self._weights(), rows, activation)
        return sum_parts(y, self.model_group)

    def _weights(self) -> ExpertWeights:
        """Of this process; every process of a row adds its share of the last bias."""
        mean, shares = 1 / self.grid.data, self.grid.model
        expand, expand_bias, contract = (
            scale_gradient(_local(tensor), mean) for tensor in (self.expand, self.expand_bias, self.contract)
        )
        share = scale_gradient(_local(self.contract_bias) / shares, mean * shares)
        return ExpertWeights(expand, expand_bias, contract, share)


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local()
