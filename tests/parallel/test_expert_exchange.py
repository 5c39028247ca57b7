"""Experts on several processes against all of them on one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from processes import run_on
from torch import Tensor
from torch.distributed.tensor import DTensor

from subquad import Mask, receipts
from subquad.interface import FeedforwardConfig
from subquad.layers.expert_mixer import ExpertMixer
from subquad.ops.experts.routing import ExpertRows
from subquad.parallel.expert_exchange import ShardedExperts, arrived_rows, rows_of_first
from subquad.parallel.grid import DATA, Grid, make_mesh

WIDTH, LENGTH, SEQUENCES = 6, 5, 4
DROPLESS: dict[str, Any] = {"name": "switch", "jitter": 0.0, "capacity_factor": None, "balance_weight": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "dropless": DROPLESS,
    "two experts a token": {"name": "moe", "top_k": 2, "balance_weight": 0.0, "z_weight": 0.0},
    "dropped tokens, a loss for each process": {"name": "switch", "jitter": 0.0, "capacity_factor": 0.5},
    "dropped tokens, a loss for each sequence": {
        "name": "switch",
        "jitter": 0.0,
        "capacity_factor": 1.0,
        "group": "sequence",
    },
    "dropped tokens, seats for each sequence": {
        "name": "switch",
        "jitter": 0.0,
        "capacity_factor": 1.0,
        "group": "sequence",
        "balance_weight": 0.0,
    },
    "both losses": {"name": "moe", "top_k": 2, "capacity_factor": 0.75},
    "relu": {**DROPLESS, "activation": "relu"},
}
Results = dict[str, Tensor]


def layer(options: dict[str, Any], dtype: torch.dtype) -> ExpertMixer:
    """Four experts, random biases, equal wherever it is called."""
    torch.manual_seed(0)
    written = {"experts": 4, "hidden_dim": 8, "min_capacity": 1, **options}
    module = FeedforwardConfig.from_dict(written).build(WIDTH)
    assert isinstance(module, ExpertMixer)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return module.to(dtype)


def tokens(dtype: torch.dtype) -> tuple[Tensor, Tensor, Mask]:
    """Input and upstream gradient (B, L, D) of all processes, and the mask, by which the last has two tokens alone."""
    generator = torch.Generator().manual_seed(1)
    x, upstream = (torch.randn(SEQUENCES, LENGTH, WIDTH, generator=generator) for _ in range(2))
    return x.to(dtype), upstream.to(dtype), Mask.from_lengths([LENGTH, LENGTH - 2, 2, 0], LENGTH)


def part_of(whole: Tensor, rank: int, parts: int) -> Tensor:
    return whole.chunk(parts)[rank]


def gathered(options: dict[str, Any], grid: Grid, dtype: torch.dtype, only_one_expert: bool) -> Results:
    """One step of this process; gradients of parameters are the whole ones."""
    mesh = make_mesh(grid)
    module = layer(options, dtype)
    if only_one_expert:
        aim_at_first(module)
    module.experts = ShardedExperts(module.experts, mesh)
    rank = mesh.get_local_rank(DATA)
    x, upstream, mask = tokens(dtype)
    assert mask.valid is not None
    x, upstream, valid = (part_of(whole, rank, grid.data) for whole in (x, upstream, mask.valid))
    x = x.clone().requires_grad_()
    with receipts() as left:
        y, _, aux_loss = module(x, mask=Mask(valid))
    ((y * upstream).sum() + (0 if aux_loss is None else aux_loss)).backward()
    assert x.grad is not None
    router = module.router.grad
    assert router is not None
    dist.all_reduce(router, group=mesh.get_group(DATA))
    found = {"y": y.detach(), "x": x.grad, "router": router}
    for name, parameter in module.experts.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        found[name] = parameter.grad.full_tensor() * grid.data
    return found | {"dropped": torch.tensor(sum(entry.count for entry in left.entries))}


def aim_at_first(module: ExpertMixer) -> None:
    """All tokens find all experts alike, and take the first."""
    with torch.no_grad():
        module.router.zero_()


def expected(options: dict[str, Any], parts: int, dtype: torch.dtype, only_one_expert: bool) -> Results:
    """The same on one process, part after part; `dropped` in all."""
    module = layer(options, dtype)
    if only_one_expert:
        aim_at_first(module)
    x, upstream, mask = tokens(dtype)
    x.requires_grad_()
    total, y = x.new_zeros(()), []
    with receipts() as left:
        for rank in range(parts):
            assert mask.valid is not None
            mixed = module(part_of(x, rank, parts), mask=Mask(part_of(mask.valid, rank, parts)))
            y.append(mixed.y)
            total = total + (mixed.y * part_of(upstream, rank, parts)).sum()
            total = total if mixed.aux_loss is None else total + mixed.aux_loss
    total.backward()
    found = {"y": torch.cat(y).detach(), "x": x.grad, "router": module.router.grad}
    found |= {name: parameter.grad for name, parameter in module.experts.named_parameters()}
    assert not [name for name, tensor in found.items() if tensor is None]
    dropped = torch.tensor(sum(entry.count for entry in left.entries))
    return {name: tensor for name, tensor in found.items() if tensor is not None} | {"dropped": dropped}


@dataclass(frozen=True)
class Comparison:
    """A layer on processes, and how many parts one process computes to give the same; None for one for each row."""

    case: str
    parts: int | None = None
    dtype: torch.dtype = torch.float64
    one_expert: bool = False


def all_gathered(comparisons: list[Comparison], grid: Grid) -> list[Results]:
    return [gathered(CASES[each.case], grid, each.dtype, each.one_expert) for each in comparisons]


def assert_equal(grid: Grid, comparisons: list[Comparison]) -> None:
    """Every process of the grid against one process; all in one start of the processes, which takes longest."""
    results = run_on(grid.processes, all_gathered, comparisons, grid)
    for index, each in enumerate(comparisons):
        one = expected(CASES[each.case], each.parts or grid.data, each.dtype, each.one_expert)
        many = [process[index] for process in results]
        rows = [many[data * grid.model] for data in range(grid.data)]
        assert sum(int(row["dropped"]) for row in rows) == int(one["dropped"]), each
        joined = {name: torch.cat([row[name] for row in rows]) for name in ("y", "x")}
        tolerance = 1e-5 if each.dtype == torch.float32 else 1e-11
        for process in many:
            torch.testing.assert_close(
                {**process, **joined, "dropped": one["dropped"]},
                one,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda message, each=each: f"{each}: {message}",
            )


@pytest.mark.parametrize("grid", [Grid(2), Grid(1, 2), Grid(2, 2), Grid(4), Grid(1)], ids=str)
def test_processes_equal_one_that_computes_their_parts(grid: Grid) -> None:
    assert_equal(grid, [Comparison(case, dtype=dtype) for case in CASES for dtype in (torch.float32, torch.float64)])


@pytest.mark.parametrize("grid", [Grid(2), Grid(2, 2)], ids=str)
def test_without_what_a_batch_shares_the_parts_are_no_matter(grid: Grid) -> None:
    cases = ("dropless", "two experts a token", "dropped tokens, seats for each sequence")
    assert_equal(grid, [Comparison(case, parts=1) for case in cases])


@pytest.mark.parametrize("grid", [Grid(2), Grid(2, 2), Grid(4)], ids=str)
def test_processes_whose_experts_nobody_wants_take_part(grid: Grid) -> None:
    assert_equal(grid, [Comparison("dropless", one_expert=True), Comparison("both losses", one_expert=True)])


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=4))
def test_rows_that_arrive_are_sorted_by_expert_and_then_by_process(coming: list[list[int]]) -> None:
    arriving = [row for process, counts in enumerate(coming) for e in (0, 1) for row in [(process, e)] * counts[e]]
    rows = arrived_rows(torch.tensor(coming))
    sorted_rows = [arriving[token] for token in rows.tokens.tolist()]
    assert sorted_rows == sorted(arriving, key=lambda row: (row[1], row[0]))
    assert sorted(rows.tokens.tolist()) == list(range(len(arriving)))
    assert rows.counts == tuple(sum(row[expert] for row in coming) for expert in range(2))


def agreed_rows() -> tuple[list[int], list[int], tuple[int, ...]]:
    found = [ExpertRows(torch.tensor([3, 1, 0]), torch.tensor([1, 0, 0]), (2, 1), 0)]
    found.append(ExpertRows(torch.tensor([2]), torch.tensor([1]), (0, 1), 0))
    group = dist.group.WORLD
    assert group is not None
    rows = rows_of_first(found[dist.get_rank()], group, torch.device("cpu"))
    return rows.tokens.tolist(), rows.choices.tolist(), rows.counts


def test_the_first_process_of_a_row_decides_what_goes_where() -> None:
    assert run_on(2, agreed_rows) == [([3, 1, 0], [1, 0, 0], (2, 1))] * 2


def test_the_cases_drop_tokens_and_leave_experts_alone() -> None:
    dropped = {case: int(expected(options, 2, torch.float64, False)["dropped"]) for case, options in CASES.items()}
    assert {case for case, count in dropped.items() if count} == {
        case for case, options in CASES.items() if options.get("capacity_factor") is not None
    }
    alone = expected(CASES["dropless"], 2, torch.float64, True)
    assert alone["expand"][0].any()
    assert not alone["expand"][1:].any()
