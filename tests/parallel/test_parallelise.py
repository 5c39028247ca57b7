"""A model on several processes against the same model on one: loss, every gradient, steps, what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_on
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from subquad.models import SubquadConfig, SubquadForSequenceClassification
from subquad.parallel.gradients import clip_gradients
from subquad.parallel.grid import DATA, Grid, make_mesh
from subquad.parallel.parallelise import parallelise

EXPERTS: dict[str, Any] = {
    "name": "switch",
    "experts": 4,
    "jitter": 0.0,
    "capacity_factor": None,
    "balance_weight": 0.0,
}
VOCABULARY, LENGTH, SEQUENCES = 11, 9, 4


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    changes: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    clip: float = 1e9
    checkpoint_activations: bool = False


CASES = {
    "experts beside dense attention": Case({"feedforward": EXPERTS}),
    "experts in every second layer": Case({"feedforward": ["mlp", EXPERTS], "mixer": ["full", "linear"]}),
    "causal, rotary, gated": Case({"feedforward": "glu", "causal": True, "positions": "rotary", "pooling": "mean"}),
    "learned positions, norms behind": Case({"feedforward": EXPERTS, "positions": "learned", "norm": "post"}),
    "window and no biases": Case({"mixer": {"name": "local", "window": 5}, "feedforward": EXPERTS, "bias": False}),
    "sizes that don't divide": Case({"hidden_size": 10, "intermediate_size": 14, "feedforward": EXPERTS}),
    "feed-forward in chunks": Case({"feedforward": "mlp", "feedforward_chunk": 4}),
    "activations computed again": Case({"feedforward": EXPERTS}, checkpoint_activations=True),
    "float32": Case({"feedforward": ["mlp", EXPERTS]}, dtype=torch.float32),
    "a cut gradient": Case({"feedforward": ["mlp", EXPERTS]}, clip=0.1),
}


def model_of(case: Case) -> SubquadForSequenceClassification:
    """Two layers, random biases, equal wherever it is called."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_labels": 3,
        "max_position_embeddings": 20,
    }
    torch.manual_seed(0)
    model = SubquadForSequenceClassification(SubquadConfig(**(sizes | case.changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if case.checkpoint_activations:
        model.activation_checkpointing_enable()
    nn.Module.to(model, case.dtype)
    return model.train()


def batch() -> dict[str, Tensor]:
    """Of all processes together."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    kept = torch.tensor([LENGTH, LENGTH - 3, LENGTH, 2])
    mask = (torch.arange(LENGTH) < kept[:, None]).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 1])}


def two_steps(model: SubquadForSequenceClassification, case: Case, inputs: dict[str, Tensor], clip: Any) -> Any:
    """Losses, norms, the first gradients by name, and the parameters at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, norms, gradients = [], [], {}
    for _ in range(2):
        loss = model(**inputs).loss
        loss.backward()
        norms.append(clip(list(model.parameters()), case.clip))
        if not gradients:
            gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    after = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    return {"losses": torch.stack(losses), "norms": torch.stack(norms), "gradients": gradients, "after": after}


def whole(tensor: Tensor | None) -> Tensor:
    """All of a tensor, wherever its parts lie."""
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def trained(case: Case, grid: Grid) -> Any:
    mesh = make_mesh(grid)
    model = model_of(case)
    parallelise(model, mesh)
    rank = mesh.get_local_rank(DATA)
    inputs = {name: tensor.chunk(grid.data)[rank] for name, tensor in batch().items()}
    found = two_steps(model, case, inputs, clip_gradients)
    dist.all_reduce(found["losses"], group=mesh.get_group(DATA))
    found["losses"] /= grid.data
    return found


def train_all(names: list[str], grid: Grid) -> dict[str, Any]:
    return {name: trained(CASES[name], grid) for name in names}


@cache
def on_one_process(name: str) -> Any:
    one = two_steps(model_of(CASES[name]), CASES[name], batch(), torch.nn.utils.clip_grad_norm_)
    one["norms"] = one["norms"].double()
    return one


@pytest.mark.parametrize("grid", [Grid(2), Grid(1, 2), Grid(2, 2)], ids=str)
def test_a_grid_of_processes_equals_one(grid: Grid) -> None:
    assert_equals_one_process(list(CASES), grid)


@pytest.mark.parametrize("grid", [Grid(4), Grid(1)], ids=str)
def test_other_grids_equal_one_process(grid: Grid) -> None:
    assert_equals_one_process(["experts in every second layer"], grid)


def assert_equals_one_process(names: list[str], grid: Grid) -> None:
    """All cases in one start of the processes, which takes longest."""
    for process in run_on(grid.processes, train_all, names, grid):
        for name in names:
            tolerance = 1e-5 if CASES[name].dtype == torch.float32 else 1e-10
            torch.testing.assert_close(
                process[name],
                on_one_process(name),
                rtol=tolerance,
                atol=tolerance,
                msg=lambda message, name=name: f"{name}: {message}",
            )
