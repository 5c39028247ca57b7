"""Pattern attention against fused dense attention: forward and backward, batch 1, 8 heads of width 64, float32.

    python benchmarks/pattern_attention.py                                   every pattern at 4,096 and 16,384 tokens
    python benchmarks/pattern_attention.py --rows window-513 --lengths 4096
    python benchmarks/pattern_attention.py --scaling                         time per token and peak memory of windows
    python benchmarks/pattern_attention.py --small                           from which length on a pattern pays

All methods of a length take turns in one process; figures are medians with quartiles, speed-ups have a 95 % interval.
Before any time is taken, result and gradients are held against the definition. Useful GFLOP/s count visible pairs only,
4 E forward and 3.5 times that for both directions; "of sgemm" compares them with the best product of two 2048 x 2048
matrices in the same run. "kept" is what autograd keeps, in units of q, k, v, the result and its log-sum-exp. Targets
are those of two cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from pattern_cases import (
    BATCH,
    CASES,
    FORWARD_FLOPS_PER_PAIR,
    HEADS,
    STEP_PER_FORWARD,
    WIDTH,
    Case,
    Inputs,
    check_against_definition,
    sample_beside_baselines,
    step,
    visible_pairs,
)
from pattern_scaling import measure_scaling, print_scaling
from pattern_small import measure_small, print_small
from rich.console import Console
from sampling import (
    SpeedUp,
    Spread,
    against_target,
    describe_machine,
    machine_facts,
    prepare_torch,
    result_console,
    sampling_options,
)

from subquad.benchmark.memory import saved_bytes
from subquad.benchmark.timing import interleaved_seconds
from subquad.cli.console import plain_table, waiting
from subquad.receipt import receipts
from subquad.records.units import percent

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Row:
    """What was measured of one pattern at one length; times in seconds."""

    name: str
    length: int
    seconds: Spread
    against: str
    dense_seconds: Spread
    speed_up: SpeedUp
    target: float | None
    flops_per_second: float
    of_sgemm: float
    kept: float
    receipts: list[str]


def sgemm_flops_per_second() -> float:
    """The best rate of a float32 product of two 2048 x 2048 matrices."""
    a, b = torch.rand(2048, 2048), torch.rand(2048, 2048)
    return 2 * 2048**3 / min(interleaved_seconds({"product": lambda: a @ b}, rounds=15, warm_up=3)["product"])


def kept_ratio(case: Case, length: int) -> float:
    """Saved bytes of a forward pass, in units of q, k, v, the result and its log-sum-exp."""
    attention, (q, k, v, _) = case.attention(length), Inputs.draw(length)
    least = FLOAT_BYTES * BATCH * HEADS * length * (4 * WIDTH + 1)
    return saved_bytes(lambda: attention(q, k, v), ()) / least


def receipts_of(case: Case, length: int) -> list[str]:
    """What ran instead of what was asked for, in one step."""
    with receipts() as left:
        step(case.attention(length), Inputs.draw(length))
    return [f"{entry.ran} instead of {entry.asked}: {entry.reason}" for entry in left.entries]


def measure_length(cases: Sequence[Case], length: int, options: argparse.Namespace, sgemm: float) -> list[Row]:
    """All cases at one length, in turns with the baselines that they need."""
    taken = sample_beside_baselines(cases, length, samples=options.samples, warm_up=options.warm_up)
    rows: list[Row] = []
    for case in cases:
        own, against = Spread.of(taken[case.name]), case.baseline(length)
        flops = STEP_PER_FORWARD * FORWARD_FLOPS_PER_PAIR * BATCH * visible_pairs(case.pattern(length), length)
        row = Row(
            name=case.name,
            length=length,
            seconds=own,
            against=against,
            dense_seconds=Spread.of(taken[against]),
            speed_up=SpeedUp.of(taken[against], taken[case.name]),
            target=case.targets.get(length),
            flops_per_second=flops / own.median,
            of_sgemm=flops / own.median / sgemm,
            kept=kept_ratio(case, length),
            receipts=receipts_of(case, length),
        )
        rows.append(row)
    return rows


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """The table, and the receipts below it."""
    table = plain_table()
    headings = ("pattern", "length", "ms", "against", "its ms", "speed-up", "target", "GFLOP/s", "of sgemm", "kept")
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("pattern", "against") else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.length:,}",
            row.seconds.milliseconds(),
            row.against,
            row.dense_seconds.milliseconds(),
            str(row.speed_up),
            against_target(row.speed_up, row.target),
            f"{row.flops_per_second / 1e9:.1f}",
            percent(row.of_sgemm, 0),
            f"{row.kept:.2f}",
        )
    console.print(table)
    for row in rows:
        for line in row.receipts:
            console.print(f"receipt of {row.name} at {row.length:,}: {line}")


def measure_table(console: Console, cases: Sequence[Case], options: argparse.Namespace) -> dict[str, object]:
    """The default mode."""
    sgemm = sgemm_flops_per_second()
    rows = [row for length in options.lengths or (4096, 16384) for row in measure_length(cases, length, options, sgemm)]
    print_rows(console, rows)
    console.print(f"\nsgemm: {sgemm / 1e9:.0f} GFLOP/s")
    return {"sgemm_flops_per_second": sgemm, "rows": [asdict(row) for row in rows]}


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = sampling_options(__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--scaling", action="store_true", help="time per token and peak memory, lengths 8192 to 65536")
    mode.add_argument(
        "--small", action="store_true", help="lengths 64 to 4096, and those at which a pattern has to pay"
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="instead of those of the mode")
    parser.add_argument("--rows", nargs="+", choices=CASES, metavar="ROW", help=f"of {', '.join(CASES)}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the mode that the command line asks for."""
    options, console = parse_options(arguments), result_console()
    prepare_torch(options.threads)
    describe_machine(console)
    cases = [CASES[name] for name in options.rows or (("window-513", "window-129") if options.scaling else CASES)]
    with waiting("holding results and gradients against the definition"):
        for case in cases:
            check_against_definition(case)
    if options.scaling:
        report = measure_scaling(cases, options)
        print_scaling(console, report)
        figures: dict[str, object] = {"scaling": [asdict(case) for case in report]}
    elif options.small:
        points = measure_small(cases, options)
        print_small(console, points)
        figures = {"small": [asdict(point) for point in points]}
    else:
        figures = measure_table(console, cases, options)
    if options.json is not None:
        document = {"environment": machine_facts(), **figures}
        options.json.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
