"""A small run of the training program, and its steps on any grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.parallel.byte_text import ByteText
from subquad.parallel.checkpoint import gather, load_checkpoint
from subquad.parallel.grid import Grid, make_mesh
from subquad.parallel.loop import Loop
from subquad.parallel.parallelise import parallelise
from subquad.parallel.settings import Settings
from subquad.parallel.train import build_model

EXPERTS: dict[str, Any] = {
    "name": "switch",
    "experts": 4,
    "jitter": 0.0,
    "capacity_factor": None,
    "balance_weight": 0.0,
}
SIZES: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "hidden": 24, "length": 12, "batch": 4, "warm_up": 2}


def settings(output: str = "", **changes: Any) -> Settings:
    """Of a run of three steps."""
    return Settings(**{**SIZES, "feedforward": ["mlp", EXPERTS], "steps": 3, "output": output, **changes})


def text(given: Settings) -> ByteText:
    """This file."""
    return ByteText([Path(__file__)], length=given.length)


def loop_on(grid: Grid, given: Settings, checkpoint: str | None = None) -> Loop:
    """A fresh loop, or one that goes on."""
    model, mesh = build_model(given), make_mesh(grid)
    parallelise(model, mesh)
    loop = Loop(model, text(given), given, mesh, torch.device("cpu"))
    if checkpoint is not None:
        load_checkpoint(Path(checkpoint), model, loop.optimizer)
    return loop


def whole_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """All of every parameter.

    But for the bias of keys, which softmax doesn't see: its gradient is rounding, which AdamW makes whole steps of.
    """
    every = {name: gather(parameter.detach()).clone() for name, parameter in model.named_parameters()}
    return {name: tensor for name, tensor in every.items() if not name.endswith("project_key.bias")}
