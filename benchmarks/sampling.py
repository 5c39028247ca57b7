"""Samples of several functions taken by turns, with a bar on standard error, and what they say."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from subquad.benchmark.allocator import freed_memory_kept
from subquad.benchmark.environment import this_environment
from subquad.benchmark.timing import interleaved_seconds
from subquad.cli.console import BAD, GOOD, progress_console
from subquad.cli.progress import Progress
from subquad.records.units import times

SAMPLES, SAMPLES_OF_SLOW, SLOW_SECONDS = 15, 5, 2.0
RESAMPLES = 2000
WIDEST_TABLE = 160


@dataclass(frozen=True)
class Spread:
    """Samples as their median and quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of some samples."""
        lower, median, upper = np.percentile(samples, [25, 50, 75])
        return cls(float(median), float(lower), float(upper))

    def milliseconds(self) -> str:
        """Median and quartiles of seconds, in milliseconds: "45.1 (44.8–46.0)"."""
        return f"{1e3 * self.median:,.4g} ({1e3 * self.lower:,.4g}–{1e3 * self.upper:,.4g})"


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster one function is than another, with the ends of a 95 % interval."""

    ratio: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, baseline: Sequence[float], own: Sequence[float]) -> SpeedUp:
        """The ratio of the medians.

        The interval is a bootstrap over turns: both samples of a turn are drawn together, since a slow phase of the
        machine hits both.
        """
        slow, fast = np.asarray(baseline), np.asarray(own)
        turns = np.random.default_rng(0).integers(len(fast), size=(RESAMPLES, len(fast)))
        ratios = np.median(slow[turns], axis=1) / np.median(fast[turns], axis=1)
        lowest, highest = np.percentile(ratios, [2.5, 97.5])
        return cls(float(np.median(slow) / np.median(fast)), float(lowest), float(highest))

    def __str__(self) -> str:
        return f"{times(self.ratio)} ({self.lowest:.3g}–{self.highest:.3g})"


def sample_by_turns(
    functions: Mapping[str, Callable[[], object]],
    *,
    samples: int | None,
    warm_up: int,
    title: str,
    keep_freed_memory: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each function: every one once, then every one again.

    Args:
        functions: by name.
        samples: of each function; None for 15, or for 5 where a function takes more than two seconds.
        warm_up: turns before the samples.
        title: what the bar says.
        keep_freed_memory: whether the C library keeps freed memory meanwhile, as the protocol wants it; what this
            process kept once it keeps for good.
    """
    with freed_memory_kept() if keep_freed_memory else nullcontext(), Progress(progress_console()) as bars:
        bar = bars.start(title)
        slowest = 0.0
        for name in list(functions) * warm_up:
            bar.update(0, note=f"warm-up: {name}")
            slowest = max(slowest, _seconds(functions[name]))
        rounds = samples or (SAMPLES_OF_SLOW if slowest > SLOW_SECONDS else SAMPLES)
        taken: dict[str, list[float]] = {name: [] for name in functions}
        for turn, name in enumerate(list(functions) * rounds):
            bar.update(turn, total=rounds * len(functions), note=name)
            taken[name].append(_seconds(functions[name]))
        bar.finish(f"{rounds} samples by turns")
    return taken


def _seconds(function: Callable[[], object]) -> float:
    return interleaved_seconds({"only": function}, rounds=1, warm_up=0)["only"][0]


def sampling_options(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks of attention share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, help="of each method (15, or 5 where one takes more than 2 s)")
    parser.add_argument("--warm-up", type=int, default=3, help="turns before the samples (3)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    return parser


def prepare_torch(threads: int) -> None:
    """Threads, and no slow arithmetic on denormal numbers."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def result_console() -> Console:
    """Standard output; never so narrow that figures of a table are cut."""
    return Console(highlight=False, width=max(WIDEST_TABLE, Console().width))


def against_target(speed_up: SpeedUp, target: float | None) -> Text:
    """The target of a speed-up, green where it is reached and red where not; nothing without one."""
    if target is None:
        return Text("–")
    reached = speed_up.ratio >= target
    return Text(f"{target:g}× {'✓' if reached else '✗'}", GOOD if reached else BAD)


def machine_facts() -> dict[str, Any]:
    """The environment, as a JSON file keeps it."""
    return this_environment().model_dump(mode="json")


def write_figures(path: Path | None, figures: Mapping[str, object]) -> None:
    """Write figures to a JSON file, if one is asked for, with the command and the machine that they depend on."""
    if path is not None:
        document = {"command": _command(path), "environment": machine_facts(), **figures}
        path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _command(figures: Path) -> str:
    """This program as it was started, but for the file that it writes."""
    aside = ("--json", str(figures), f"--json={figures}")
    arguments = [argument for argument in sys.argv[1:] if argument not in aside]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def describe_machine(console: Console) -> None:
    """One line: what the figures below depend on."""
    here = this_environment()
    console.print(f"{here.cpu}, {here.threads} threads, torch {here.torch}, commit {here.commit}\n")
