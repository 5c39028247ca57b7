"""One training step of a windowed layer on a very long sequence: seconds, and the most memory that the process held.

    python benchmarks/long_sequence.py

`local` with window 513, width 512 and 8 heads, at 262,144 tokens, float32; the step is to fit into 16 GB, Python and
torch included. The peak is the high-water mark of this process's resident set (Linux only), so a run measures one step.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from sampling import describe_machine, prepare_torch, result_console

import subquad
from subquad.cli.console import BAD, GOOD
from subquad.records import units


def train_one_step(length: int, window: int) -> float:
    """Forward, backward and update of a mean square; the seconds that they take."""
    torch.manual_seed(0)
    mixer = subquad.build_mixer("local", embed_dim=512, num_heads=8, window=window)
    optimiser = torch.optim.AdamW(mixer.parameters())
    x = torch.randn(1, length, 512, requires_grad=True)
    start = time.perf_counter()
    mixer(x).y.square().mean().backward()
    optimiser.step()
    return time.perf_counter() - start


def most_resident_bytes() -> int:
    """The high-water mark of this process's resident set since it began."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line of figures and whether the limit was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=262_144)
    parser.add_argument("--window", type=int, default=513)
    parser.add_argument("--limit", type=float, default=16.0, help="in GB (16)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    options, console = parser.parse_args(arguments), result_console()
    prepare_torch(options.threads)
    describe_machine(console)
    seconds = train_one_step(options.length, options.window)
    peak = most_resident_bytes()
    console.print(
        f"{options.length:,} tokens, window {options.window}: {units.seconds(seconds)}, peak {units.size(peak)}"
    )
    verdict, style = ("within", GOOD) if peak < 1e9 * options.limit else ("above", BAD)
    console.print(f"{verdict} {options.limit:g} GB", style=style)


if __name__ == "__main__":
    main()
