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
from transformers import PreTrainedModel

from subquad.models import (
    SubquadConfig,
    SubquadForCausalLM,
    SubquadForMaskedLM,
    SubquadForSeq2SeqLM,
    SubquadForSequenceClassification,
)
from subquad.parallel.checkpoint import gather
from subquad.parallel.gradients import clip_gradients, local_part
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
    kind: type[PreTrainedModel] = SubquadForSequenceClassification
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
    "causal language model": Case({"feedforward": EXPERTS}, SubquadForCausalLM),
    "masked language model": Case({"feedforward": EXPERTS, "mixer": "topk"}, SubquadForMaskedLM),
    "encoder and decoder": Case({"feedforward": ["mlp", EXPERTS]}, SubquadForSeq2SeqLM),
    "float32": Case({"feedforward": ["mlp", EXPERTS]}, dtype=torch.float32),
    "a cut gradient": Case({"feedforward": ["mlp", EXPERTS]}, clip=0.1),
}


def model_of(case: Case) -> PreTrainedModel:
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
    model = case.kind(SubquadConfig(**(sizes | case.changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if case.checkpoint_activations:
        model.activation_checkpointing_enable()
    nn.Module.to(model, case.dtype)
    return model.train()


def batch(case: Case) -> dict[str, Tensor]:
    """Of all processes together; every example predicts as many tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    kept = torch.tensor([LENGTH, LENGTH - 3, LENGTH, 2])
    mask = (torch.arange(LENGTH) < kept[:, None]).long()
    labels = torch.tensor([0, 1, 2, 1]) if case.kind is SubquadForSequenceClassification else tokens
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def two_steps(model: PreTrainedModel, case: Case, inputs: dict[str, Tensor], clip: Any) -> Any:
    """Losses, norms, the first gradients by name, and the parameters at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, norms, gradients = [], [], {}
    for _ in range(2):
        loss = model(**inputs).loss
        loss.backward()
        norms.append(clip(list(model.parameters()), case.clip))
        if not gradients:
            of_names = {name: parameter.grad for name, parameter in model.named_parameters()}
            gradients = {name: gather(grad).clone() for name, grad in of_names.items() if grad is not None}
            assert len(gradients) == len(of_names)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    after = {name: gather(parameter.detach()) for name, parameter in model.named_parameters()}
    return {"losses": torch.stack(losses), "norms": torch.stack(norms), "gradients": gradients, "after": after}


def trained(case: Case, grid: Grid) -> Any:
    mesh = make_mesh(grid)
    model = model_of(case)
    parallelise(model, mesh)
    rank = mesh.get_local_rank(DATA)
    inputs = {name: tensor.chunk(grid.data)[rank] for name, tensor in batch(case).items()}
    found = two_steps(model, case, inputs, clip_gradients)
    dist.all_reduce(found["losses"], group=mesh.get_group(DATA))
    found["losses"] /= grid.data
    return found


def train_all(names: list[str], grid: Grid) -> dict[str, Any]:
    return {name: trained(CASES[name], grid) for name in names}


@cache
def on_one_process(name: str) -> Any:
    case = CASES[name]
    one = two_steps(model_of(case), case, batch(case), torch.nn.utils.clip_grad_norm_)
    one["norms"] = one["norms"].double()
    return one


@pytest.mark.parametrize("grid", [Grid(2), Grid(1, 2), pytest.param(Grid(2, 2), marks=pytest.mark.slow)], ids=str)
def test_a_grid_of_processes_equals_one(grid: Grid) -> None:
    assert_equals_one_process(list(CASES), grid)


@pytest.mark.parametrize("grid", [Grid(2, 2), Grid(4), Grid(1)], ids=str)
def test_any_grid_equals_one_process(grid: Grid) -> None:
    assert_equals_one_process(["experts in every second layer", "causal language model", "a cut gradient"], grid)


def assert_equals_one_process(names: list[str], grid: Grid) -> None:
    """All cases in one start of the processes, which takes longest."""
    for process in run_on(grid.processes, train_all, names, grid):
        for name in names:
            wide = CASES[name].dtype == torch.float64 and CASES[name].kind is SubquadForSequenceClassification
            tolerance = 1e-10 if wide else 1e-5  # the losses of language models are float32 at best
            torch.testing.assert_close(
                process[name],
                on_one_process(name),
                rtol=tolerance,
                atol=tolerance,
                msg=lambda message, name=name: f"{name}: {message}",
            )


def shares(grid: Grid) -> dict[str, float]:
    """How much of some parameters lies on this process."""
    model = model_of(CASES["experts in every second layer"])
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    parallelise(model, make_mesh(grid))
    return {
        name.removeprefix("model.blocks."): local_part(parameter.detach()).numel() / sizes[name]
        for name, parameter in model.named_parameters()
    }


def test_a_process_keeps_its_share_of_the_parameters() -> None:
    for found in run_on(4, shares, Grid(2, 2)):
        assert len(found) == len(dict(model_of(CASES["experts in every second layer"]).named_parameters()))
        assert {found[f"1.feedforward.experts.{name}"] for name in ("expand", "expand_bias", "contract")} == {1 / 4}
        assert {found[f"0.mixer.project_{name}.weight"] for name in ("query", "key", "value", "out")} == {1 / 4}
        assert {found[f"0.feedforward.{name}.weight"] for name in ("expand", "contract")} == {1 / 4}
        assert {found[f"1.{name}"] for name in ("feedforward.router", "mixer_norm.weight")} == {1 / 2}


def narrow_steps(grid: Grid) -> tuple[Tensor, Tensor]:
    """Losses and norms of two steps in bfloat16."""
    case = Case({"feedforward": ["mlp", EXPERTS]}, dtype=torch.bfloat16)
    found = trained(case, grid)
    return found["losses"], found["norms"]


def test_bfloat16_is_near_the_wide_result() -> None:
    wide = on_one_process("experts in every second layer")
    for losses, norms in run_on(4, narrow_steps, Grid(2, 2)):
        assert losses.dtype == torch.bfloat16
        torch.testing.assert_close(losses.double(), wide["losses"], rtol=0.05, atol=0.05)
        assert bool(norms.isfinite().all())
