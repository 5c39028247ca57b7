"""Memory of a training step against depth: standard residuals, activation checkpoints, reversible residuals.

    python benchmarks/reversible_memory.py

Kept is what autograd holds after the forward pass. The peak is the most that tensors hold at once in forward and
backward, less the gradients of the parameters, which every way of training needs. Twelve reversible layers are to need
at most 1.3 times what one needs. The process is the growth of the resident set of a process of its own, gradients
included; the C library may keep freed blocks in it (with MALLOC_MMAP_THRESHOLD_=1000000 it doesn't). Seconds are of
one step, and only tell what the second forward pass costs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.text import Text
from sampling import describe_machine, prepare_torch, result_console
from torch import Tensor

from subquad.benchmark.memory import PeakMemory, allocated_peak_bytes, saved_bytes
from subquad.cli.console import BAD, GOOD, plain_table, progress_console
from subquad.cli.progress import Progress
from subquad.models import SubquadConfig, SubquadModel
from subquad.records import units

MOST_GROWTH = 1.3
FIRST_STEP = 64
WAYS: dict[str, dict[str, Any]] = {
    "standard": {},
    "checkpoints": {"checkpointed": True},
    "reversible": {"residual": "reversible"},
    "reversible, chunks": {"residual": "reversible", "feedforward_chunk": 256},
}


@dataclass(frozen=True)
class Sizes:
    """What a step is measured with."""

    length: int
    hidden_size: int
    mixer: str
    threads: int


@dataclass(frozen=True)
class Step:
    """What one training step took."""

    kept_bytes: int
    peak_bytes: int
    process_bytes: int | None
    seconds: float


def build(way: str, depth: int, sizes: Sizes) -> SubquadModel:
    """A stack in training mode."""
    options = dict(WAYS[way])
    checkpointed = options.pop("checkpointed", False)
    config = SubquadConfig(
        vocab_size=32,
        hidden_size=sizes.hidden_size,
        intermediate_size=4 * sizes.hidden_size,
        num_hidden_layers=depth,
        num_attention_heads=8,
        mixer=sizes.mixer,
        dropout=0.1,
        pooling="mean",
        max_position_embeddings=sizes.length,
        **options,
    )
    model = SubquadModel(config).train()
    if checkpointed:
        model.activation_checkpointing_enable()
    return model


def measure(way: str, depth: int, sizes: Sizes) -> Step:
    """One step, alone in this process."""
    prepare_torch(sizes.threads)
    torch.manual_seed(0)
    model = build(way, depth, sizes)
    step(model, FIRST_STEP)()
    gradients = sum(parameter.nbytes for parameter in model.parameters() if parameter.grad is not None)
    model.zero_grad()
    memory, run = PeakMemory(), step(model, sizes.length)
    memory.restart()
    start = time.perf_counter()
    run()
    seconds, process = time.perf_counter() - start, memory.bytes()
    model.zero_grad()
    kept = saved_bytes(forward(model, sizes.length), model.parameters())
    return Step(kept, allocated_peak_bytes(run) - gradients, process, seconds)


def forward(model: SubquadModel, length: int) -> Callable[[], Tensor]:
    """The forward pass."""
    tokens = torch.arange(length)[None] % model.config.vocab_size
    return lambda: model(tokens).last_hidden_state.square().mean()


def step(model: SubquadModel, length: int) -> Callable[[], None]:
    """Forward and backward."""
    run = forward(model, length)
    return lambda: run().backward()


def in_fresh_process(way: str, depth: int, sizes: Sizes) -> Step:
    """`measure` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (way, depth, sizes))


def measure_all(ways: Sequence[str], depths: Sequence[int], sizes: Sizes) -> dict[str, dict[int, Step]]:
    """Every way at every depth, with a bar."""
    found: dict[str, dict[int, Step]] = {way: {} for way in ways}
    with Progress(progress_console()) as bars:
        bar, cases = bars.start("a step of each"), [(way, depth) for way in ways for depth in depths]
        for done, (way, depth) in enumerate(cases):
            bar.update(done, total=len(cases), note=f"{way}, {depth} layers")
            found[way][depth] = in_fresh_process(way, depth, sizes)
        bar.finish(f"{len(cases)} processes, one after the other")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, and whether reversible layers keep their promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 12])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--mixer", default="local")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    options, console = parser.parse_args(arguments), result_console()
    sizes = Sizes(options.length, options.hidden_size, options.mixer, options.threads)
    describe_machine(console)
    table, verdicts = plain_table(), []
    for heading in ("residuals", "layers", "kept", "peak", "peak over that of the fewest", "process", "seconds"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "residuals" else "right")
    found = measure_all(options.ways, sorted(options.depths), sizes)
    for way, steps in found.items():
        fewest = next(iter(steps.values()))
        for depth, taken in steps.items():
            growth = taken.peak_bytes / fewest.peak_bytes
            process = "–" if taken.process_bytes is None else units.size(taken.process_bytes)
            held = units.size(taken.kept_bytes), units.size(taken.peak_bytes), units.times(growth), process
            table.add_row(way, str(depth), *held, units.seconds(taken.seconds))
            if "residual" in WAYS[way] and taken is not fewest:
                verdicts.append((f"{way}, {depth} layers: {units.times(growth)}", growth <= MOST_GROWTH))
    console.print(table)
    for text, good in verdicts:
        console.print(Text(f"{'✓' if good else '✗'} {text}, at most {MOST_GROWTH:g}× wanted", GOOD if good else BAD))


if __name__ == "__main__":
    main()
