"""Whether a method's time per token and memory per token stay the same as sequences grow.

Times of all lengths are taken by turns in one process; each peak of memory is that of a fresh process, from inputs to
gradients, above what it held after a step on a short sequence.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attention_rows import Inputs, Method, step
from rich.console import Console
from rich.text import Text
from sampling import Spread, prepare_torch, sample_by_turns

from subquad.benchmark.memory import PeakMemory
from subquad.cli.console import BAD, GOOD, plain_table
from subquad.records import units

LENGTHS = (8192, 16384, 32768, 65536)
MOST_GROWTH = 2.1
FIRST_STEP = 512

Find = Callable[[str], Method]
"""A method by its name: a module's own function, since a fresh process looks it up."""


@dataclass(frozen=True)
class Point:
    """One length; peak None where the system doesn't tell."""

    length: int
    seconds: Spread
    peak_bytes: int | None

    @property
    def seconds_per_token(self) -> float:
        """By the median."""
        return self.seconds.median / self.length


@dataclass(frozen=True)
class Scaling:
    """One method over lengths."""

    name: str
    points: list[Point]

    @property
    def spread(self) -> float:
        """How much more the dearest token costs than the cheapest: 0.1 for 10 %."""
        prices = [point.seconds_per_token for point in self.points]
        return max(prices) / min(prices) - 1

    def growth(self, index: int) -> float | None:
        """Peak at a length over the peak at half that length, where both are known."""
        point = self.points[index]
        half = [other.peak_bytes for other in self.points if 2 * other.length == point.length]
        return point.peak_bytes / half[0] if half and half[0] and point.peak_bytes else None


def measure_scaling(names: Sequence[str], find: Find, options: argparse.Namespace) -> list[Scaling]:
    """Times and peaks of all methods."""
    return [_measure_method(name, find, options) for name in names]


def _measure_method(name: str, find: Find, options: argparse.Namespace) -> Scaling:
    lengths = sorted(options.lengths or LENGTHS)
    peaks = {length: peak_in_fresh_process(name, find, length, options.threads) for length in lengths}
    inputs = {length: Inputs.draw(length) for length in lengths}
    attentions = {length: find(name).attention(length) for length in lengths}
    taken = sample_by_turns(
        {f"{length:,}": lambda length=length: step(attentions[length], inputs[length]) for length in lengths},
        samples=options.samples,
        warm_up=options.warm_up,
        title=name,
    )
    return Scaling(name, [Point(length, Spread.of(taken[f"{length:,}"]), peaks[length]) for length in lengths])


def peak_in_fresh_process(name: str, find: Find, length: int, threads: int) -> int | None:
    """Peak of one step of a method, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_of_step, (name, find, length, threads))


def _peak_of_step(name: str, find: Find, length: int, threads: int) -> int | None:
    prepare_torch(threads)
    step(find(name).attention(FIRST_STEP), Inputs.draw(FIRST_STEP))
    memory = PeakMemory()
    memory.restart()
    step(find(name).attention(length), Inputs.draw(length))
    return memory.bytes()


def print_scaling(console: Console, report: Sequence[Scaling], *, most_spread: float) -> None:
    """A table, and for each method whether the dearest token costs at most `most_spread` more than the cheapest."""
    table = plain_table()
    for heading in ("method", "length", "ms", "µs per token", "peak", "peak over that at half"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "method" else "right")
    for case in report:
        for index, point in enumerate(case.points):
            table.add_row(
                case.name,
                f"{point.length:,}",
                point.seconds.milliseconds(),
                f"{1e6 * point.seconds_per_token:.2f}",
                "–" if point.peak_bytes is None else units.size(point.peak_bytes),
                _growth(case.growth(index)),
            )
    console.print(table)
    for case in report:
        mark, style = ("✓", GOOD) if case.spread <= most_spread else ("✗", BAD)
        spread = f"{units.percent(case.spread)} (at most {units.percent(most_spread, 0)} wanted)"
        console.print(Text(f"{mark} {case.name}: time per token differs by {spread}", style))


def _growth(growth: float | None) -> Text:
    if growth is None:
        return Text("–")
    return Text(units.times(growth), GOOD if growth <= MOST_GROWTH else BAD)
