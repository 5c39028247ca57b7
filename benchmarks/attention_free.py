"""Mechanisms without attention: against causal fused dense attention, or the matrix products that they consist of.

    python benchmarks/attention_free.py                             every row at 4,096 tokens, about a minute
    python benchmarks/attention_free.py --rows aft-simple gru

Batch 1, width 512, float32, forward and backward, by turns; figures are medians with quartiles, ratios have a 95 %
interval. AFT is timed between its projections, gMLP and the local networks of R-Transformer with all of theirs. The
products are plain ones of the same sizes, one forward and two backward. Targets are those of two cores. The tests hold
results and gradients against the definitions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from attention_free_cases import CASES, Case
from rich.console import Console
from rich.text import Text
from sampling import (
    SpeedUp,
    Spread,
    describe_machine,
    prepare_torch,
    result_console,
    sample_by_turns,
    sampling_options,
    write_figures,
)

from subquad.cli.console import BAD, GOOD, plain_table

LENGTH, SAMPLES = 4096, 3


@dataclass(frozen=True)
class Row:
    """What was measured of one method; times in seconds.

    Attributes:
        name: of the method.
        seconds: a step of it.
        against: what it is held against.
        its_seconds: a step of that.
        ratio: how many times faster it is than dense attention, or how many times the time of its products it takes.
        target: of the ratio.
        reached: whether the ratio is at least the target against dense attention, at most against products.
    """

    name: str
    seconds: Spread
    against: str
    its_seconds: Spread
    ratio: SpeedUp
    target: float
    reached: bool


def measure(cases: Sequence[Case], length: int, *, samples: int, warm_up: int) -> list[Row]:
    """All methods by turns, and what they are held against."""
    baselines = {case.name: case.baseline(length) for case in cases}
    steps = dict(baselines.values()) | {case.name: case.method(length) for case in cases}
    taken = sample_by_turns(steps, samples=samples, warm_up=warm_up, title=f"{length:,} tokens")
    rows: list[Row] = []
    for case in cases:
        against, _ = baselines[case.name]
        own, its = taken[case.name], taken[against]
        faster = SpeedUp.of(its, own) if case.products is None else SpeedUp.of(own, its)
        reached = faster.ratio >= case.target if case.products is None else faster.ratio <= case.target
        rows.append(Row(case.name, Spread.of(own), against, Spread.of(its), faster, case.target, reached))
    return rows


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """The table."""
    table = plain_table()
    for heading in ("method", "ms", "against", "its ms", "ratio", "target"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("method", "against") else "right")
    for row in rows:
        bound = "≥" if CASES[row.name].products is None else "≤"
        table.add_row(
            row.name,
            row.seconds.milliseconds(),
            row.against,
            row.its_seconds.milliseconds(),
            str(row.ratio),
            Text(f"{bound} {row.target:g}× {'✓' if row.reached else '✗'}", GOOD if row.reached else BAD),
        )
    console.print(table)
    console.print("\n≥: times faster than dense attention; ≤: times the time of its products")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = sampling_options(__doc__)
    parser.set_defaults(samples=SAMPLES, warm_up=1)
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens ({LENGTH:,})")
    parser.add_argument("--rows", nargs="+", choices=CASES, metavar="ROW", help=f"of {', '.join(CASES)}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the figures where asked."""
    options, console = parse_options(arguments), result_console()
    prepare_torch(options.threads)
    describe_machine(console)
    cases = [CASES[name] for name in options.rows or CASES]
    rows = measure(cases, options.length, samples=options.samples, warm_up=options.warm_up)
    print_rows(console, rows)
    write_figures(options.json, {"length": options.length, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
