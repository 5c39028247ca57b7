"""From which length on a pattern is not slower than fused dense attention.

Promised: single bands from twice their keys on, unions from four times. Lengths are the powers of two, and for each
pattern the shortest length of its promise.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from attention_rows import sample_beside_baselines
from pattern_cases import Case
from rich.console import Console
from rich.text import Text
from sampling import SpeedUp, Spread

from subquad.cli.console import BAD, GOOD, QUIET, plain_table

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
SAMPLES = 51


@dataclass(frozen=True)
class Point:
    """One pattern at one length."""

    name: str
    length: int
    promised: bool
    seconds: Spread
    dense_seconds: Spread
    speed_up: SpeedUp

    @property
    def verdict(self) -> Text:
        """Slower only where the whole interval says so."""
        if self.speed_up.highest < 1:
            return Text("slower", BAD if self.promised else QUIET)
        if self.speed_up.lowest <= 1:
            return Text("level", "none" if self.promised else QUIET)
        return Text("faster", GOOD)


def measure_small(cases: Sequence[Case], options: argparse.Namespace) -> list[Point]:
    """Every case at every length, and at the border of its promise."""
    lengths = set(options.lengths or LENGTHS)
    borders = {case.name: case.shortest_that_pays() for case in cases}
    points: list[Point] = []
    for length in sorted(lengths | set(borders.values())):
        here = [case for case in cases if length in lengths or borders[case.name] == length]
        points += _measure_length(here, length, options)
    return points


def _measure_length(cases: Sequence[Case], length: int, options: argparse.Namespace) -> list[Point]:
    samples = options.samples or SAMPLES
    taken = sample_beside_baselines(cases, length, samples=samples, warm_up=options.warm_up)
    points: list[Point] = []
    for case in cases:
        dense = taken[case.baseline(length)]
        point = Point(
            name=case.name,
            length=length,
            promised=length >= case.shortest_that_pays(),
            seconds=Spread.of(taken[case.name]),
            dense_seconds=Spread.of(dense),
            speed_up=SpeedUp.of(dense, taken[case.name]),
        )
        points.append(point)
    return points


def print_small(console: Console, points: Sequence[Point]) -> None:
    """Every point, by pattern, and a list of the promises that are not kept."""
    table = plain_table()
    for heading in ("pattern", "length", "promised", "ms", "dense ms", "speed-up", ""):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("pattern", "promised", "") else "right")
    for name in dict.fromkeys(point.name for point in points):
        for point in (point for point in points if point.name == name):
            table.add_row(
                name,
                f"{point.length:,}",
                "yes" if point.promised else "–",
                point.seconds.milliseconds(),
                point.dense_seconds.milliseconds(),
                str(point.speed_up),
                point.verdict,
            )
    console.print(table)
    broken = [point for point in points if point.promised and point.speed_up.highest < 1]
    for point in broken:
        console.print(Text(f"{point.name} is slower than dense attention at {point.length:,}: {point.speed_up}", BAD))
    if not broken:
        console.print(Text("No pattern is slower than dense attention where it promises not to be.", GOOD))
