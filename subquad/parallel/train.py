"""The training program: a language model of bytes, on as many processes as torchrun starts.

    torchrun --nproc-per-node 4 -m subquad.parallel.train --model-parallel 2 --output run

`docs/parallel.md` says what lies where and what is sent, and how to start it on several machines.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from subquad.byte_ids import MASKED_VOCABULARY, PAD_TOKEN_ID, UNMASKED_VOCABULARY
from subquad.divergence import DivergenceError
from subquad.models import SubquadConfig, SubquadForCausalLM, SubquadForMaskedLM
from subquad.parallel.byte_text import ByteText, standard_library
from subquad.parallel.check import check_model
from subquad.parallel.checkpoint import check_agreement, last_checkpoint, load_checkpoint, read_state
from subquad.parallel.grid import Grid, make_mesh
from subquad.parallel.join import LostProcessError, Place, joined, place
from subquad.parallel.loop import Loop, Progress
from subquad.parallel.parallelise import parallelise
from subquad.parallel.settings import Settings, parse, text_files

FAILED, REFUSED = 1, 2
"""Exit codes: something went wrong on the way; what was asked for can't be done."""


def build_model(settings: Settings) -> PreTrainedModel:
    """The whole model, equal on all processes.

    Raises:
        ValueError: sizes or mixers that don't go together.
    """
    causal = settings.objective == "causal"
    config = SubquadConfig(
        vocab_size=UNMASKED_VOCABULARY if causal else MASKED_VOCABULARY,
        byte_ids=True,
        pad_token_id=PAD_TOKEN_ID,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=settings.hidden,
        mixer=settings.mixer,
        feedforward=settings.feedforward,
        max_position_embeddings=settings.length,
        causal=causal,
        dropout=settings.dropout,
    )
    torch.manual_seed(settings.seed)
    return (SubquadForCausalLM if causal else SubquadForMaskedLM)(config).train()


@dataclass(frozen=True)
class Run:
    """What every process has made for itself before they talk.

    Attributes:
        settings: of the run.
        grid: of the processes.
        model: whole.
        text: whole.
        before: the checkpoint to go on from, or None.
    """

    settings: Settings
    grid: Grid
    model: PreTrainedModel
    text: ByteText
    before: Path | None


def prepare(settings: Settings, world_size: int) -> Run:
    """Make what a process needs; it doesn't talk to others.

    Raises:
        ValueError: a model or a batch that doesn't fit the processes, text that can't be read, a run that is there
            already, or that these settings don't go on with.
    """
    grid = Grid.of_world(world_size, model=settings.model_parallel)
    if settings.batch % grid.data:
        raise ValueError(
            f"--batch {settings.batch} can't be shared out evenly among {grid.data} data-parallel processes (world "
            f"size {grid.processes}, {grid.model} to a row); it must be a multiple of {grid.data}"
        )
    model = build_model(settings)
    check_model(model, grid)
    text = ByteText(text_files(settings, standard_library()), length=settings.length)
    before = last_checkpoint(Path(settings.output))
    if before is not None:
        if not settings.resume:
            raise ValueError(f"{settings.output} has a run in it already: give --resume to go on, or another --output")
        settings.check_continues(read_state(before)["settings"])
    return Run(settings, grid, model, text, before)


def train(run: Run, here: Place) -> None:
    """The part of this process in a run.

    Raises:
        LostProcessError: another process ended.
        CheckpointError: the checkpoint can't be read, or a new one written.
    """
    settings, model = run.settings, run.model
    with joined(run.grid, here, device_type=settings.device, timeout_seconds=settings.timeout_seconds) as device:
        mesh = make_mesh(run.grid, settings.device)
        nn.Module.to(model, device)
        parallelise(model, mesh)
        loop = Loop(model, run.text, settings, mesh, device)
        start = 0 if run.before is None else load_checkpoint(run.before, model, loop.optimizer)["step"]
        check_agreement(start, device)
        if here.rank == 0:
            print(f"{run.grid.data} x {run.grid.model} processes, steps {start} to {settings.steps}", flush=True)
        loop.run(start, _print if here.rank == 0 else _say_nothing)


def _print(progress: Progress) -> None:
    print(
        f"step {progress.step}  loss {progress.loss:.4f}  gradient {progress.gradient_norm:.3f}  "
        f"{progress.bytes_per_second:,.0f} bytes/s",
        flush=True,
    )


def _say_nothing(progress: Progress) -> None:
    """The first process speaks for all."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    try:
        settings, here = parse(arguments), place()
        run = prepare(settings, here.world_size)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":  # all processes say the same
            print(f"error: {error}", file=sys.stderr, flush=True)
        return REFUSED
    # Nobody changes in place what the model returns, which is what torch warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    try:
        train(run, here)
    except LostProcessError as error:
        print(f"{error}. Start again with --resume to go on from the last checkpoint.", file=sys.stderr, flush=True)
        return FAILED
    except (DivergenceError, ValueError, OSError) as error:
        print(f"error, process {here.rank}: {error}", file=sys.stderr, flush=True)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
