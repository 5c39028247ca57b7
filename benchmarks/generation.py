"""Whether generation with a state stays as fast and as small as it began: token 1,000 against token 20,000.

    python benchmarks/generation.py
    python benchmarks/generation.py --mixers linear aft:kind=simple --tokens 5000

A model of two layers writes one token after another with `StreamingGenerator`, batch 1. At each mark the memory that
the process holds is taken (its resident set; Linux only). The times are medians of 500 tokens from each mark on, by
turns: the stream behind token 20,000, and the same stream gone on from its snapshot at token 1,000. Every mixer has a
process of its own. Flat means: no more than 10 % and 16 MB apart.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from rich.text import Text
from sampling import describe_machine, prepare_torch, result_console
from torch import Tensor

from subquad.benchmark.memory import resident_bytes
from subquad.benchmark.mixers import parse_mixer
from subquad.benchmark.timing import interleaved_seconds
from subquad.cli.console import BAD, GOOD, plain_table, waiting
from subquad.records import units

MIXERS = ("linear", "local", "transformer_xl", "aft:kind=simple", "retention")
FIRST, AROUND, WARM_UP = 1000, 500, 20
MOST_SLOWER, MOST_BYTES = 1.10, 16_000_000


@dataclass(frozen=True)
class Mark:
    """A place in the stream: median seconds per token from there on, and what the process holds; None where unknown."""

    seconds: float
    resident_bytes: int | None


@dataclass(frozen=True)
class Stream:
    """One mixer: its marks, and the bytes of its state."""

    mixer: str
    early: Mark
    late: Mark
    state_bytes: int

    @property
    def flat(self) -> bool:
        """Whether neither time nor memory grew."""
        both = self.early.resident_bytes, self.late.resident_bytes
        grown = 0 if both[0] is None or both[1] is None else both[1] - both[0]
        return self.late.seconds <= MOST_SLOWER * self.early.seconds and grown <= MOST_BYTES


def write_stream(mixer: str, tokens: int, width: int, threads: int) -> Stream:
    """Generate so many tokens, greedily, and look at the clock and the memory on the way."""
    from subquad.models import StreamingGenerator, SubquadConfig, SubquadForCausalLM

    prepare_torch(threads)
    torch.manual_seed(0)
    config = SubquadConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * width,
        mixer=parse_mixer(mixer).config.to_dict(),
    )
    model = SubquadForCausalLM(config).eval()
    stream = StreamingGenerator(model, torch.tensor([[72, 105]]))
    _write(stream, FIRST)
    first_bytes, at_first = resident_bytes(), stream.snapshot()
    _write(stream, tokens - FIRST)
    last_bytes, early = resident_bytes(), StreamingGenerator.resume(model, at_first)
    taken = interleaved_seconds(
        {"early": lambda: next(early), "late": lambda: next(stream)}, rounds=AROUND, warm_up=WARM_UP
    )
    first, last = (statistics.median(taken[name]) for name in ("early", "late"))
    return Stream(mixer, Mark(first, first_bytes), Mark(last, last_bytes), stream.state_bytes)


def _write(stream: Iterator[Tensor], tokens: int) -> None:
    for _ in islice(stream, tokens):
        pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table and a verdict on each mixer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS))
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    options, console = parser.parse_args(arguments), result_console()
    if options.tokens <= FIRST:
        parser.error(f"--tokens must be more than {FIRST}")
    describe_machine(console)
    table = plain_table()
    for heading in ("mixer", "ms at 1,000", f"ms at {options.tokens:,}", "process", "process then", "state", "flat"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "mixer" else "right")
    for mixer in options.mixers:
        with waiting(mixer), multiprocessing.get_context("spawn").Pool(1) as pool:
            stream = pool.apply(write_stream, (mixer, options.tokens, options.width, options.threads))
        marks = stream.early, stream.late
        held = ("–" if mark.resident_bytes is None else units.size(mark.resident_bytes) for mark in marks)
        verdict = Text("✓", GOOD) if stream.flat else Text("✗", BAD)
        table.add_row(
            mixer, *(f"{1e3 * mark.seconds:.2f}" for mark in marks), *held, units.size(stream.state_bytes), verdict
        )
    console.print(table)


if __name__ == "__main__":
    main()
