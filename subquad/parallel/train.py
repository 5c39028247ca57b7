"""The training program: a language model of bytes, on as many processes as torchrun starts.

    torchrun --nproc-per-node 4 -m subquad.parallel.train --model-parallel 2 --output run

`docs/parallel.md` says what lies where and what is sent, and how to start it on several machines.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from subquad.models import SubquadConfig, SubquadForCausalLM, SubquadForMaskedLM
from subquad.parallel.byte_text import CAUSAL_VOCABULARY, MASKED_VOCABULARY, ByteText, standard_library
from subquad.parallel.check import check_model
from subquad.parallel.checkpoint import last_checkpoint, load_checkpoint, read_state
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
        vocab_size=CAUSAL_VOCABULARY if causal else MASKED_VOCABULARY,
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


def train(settings: Settings, here: Place) -> None:
    """The part of this process in a run.

    Raises:
        ValueError: a model or batch that doesn't fit the processes, told before they talk; text or a checkpoint that
            can't be read.
        LostProcessError: another process ended.
    """
    grid = Grid.of_world(here.world_size, model=settings.model_parallel)
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
    with joined(grid, here, device_type=settings.device, timeout_seconds=settings.timeout_seconds) as device:
        mesh = make_mesh(grid, settings.device)
        model.to(device=device)
        parallelise(model, mesh)
        loop, start = Loop(model, text, settings, mesh, device), 0
        if before is not None:
            start = load_checkpoint(before, model, loop.optimizer)["step"]
        tell = _printed if here.rank == 0 else lambda _: None
        if here.rank == 0:
            print(f"{grid.data} x {grid.model} processes, from step {start} to {settings.steps}", flush=True)
        loop.run(start, tell)


def _printed(progress: Progress) -> None:
    print(
        f"step {progress.step}  loss {progress.loss:.4f}  gradient {progress.gradient_norm:.3f}  "
        f"{progress.bytes_per_second:,.0f} bytes/s",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    try:
        settings = parse(arguments)
        train(settings, place())
    except LostProcessError as error:
        print(f"{error}. Start again with --resume to go on from the last checkpoint.", file=sys.stderr, flush=True)
        return FAILED
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
