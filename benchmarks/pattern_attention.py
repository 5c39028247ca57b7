"""Pattern attention against fused dense attention: forward and backward, batch 1, 8 heads of width 64, float32.

    python benchmarks/pattern_attention.py                                   every pattern at 4,096 and 16,384 tokens
    python benchmarks/pattern_attention.py --rows window-513 --lengths 4096
    python benchmarks/pattern_attention.py --scaling                         time per token and peak memory of windows
    python benchmarks/pattern_attention.py --small                           from which length on a pattern pays

What the columns mean stands in `attention_rows.py`. Before any time is taken, result and gradients are held against the
definition. Useful are visible pairs only: 4 E a pair forward and 3.5 times that for both directions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from attention_rows import measure_table
from pattern_cases import CASES, check_against_definition, find
from pattern_small import measure_small, print_small
from sampling import describe_machine, prepare_torch, result_console, sampling_options, write_figures
from scaling import measure_scaling, print_scaling

from subquad.cli.console import waiting

MOST_SPREAD = 0.15
"""How much more the dearest token of a window may cost than the cheapest, from 8,192 to 65,536 tokens."""


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
        report = measure_scaling([case.name for case in cases], find, options)
        print_scaling(console, report, most_spread=MOST_SPREAD)
        figures: dict[str, object] = {"scaling": [asdict(case) for case in report]}
    elif options.small:
        points = measure_small(cases, options)
        print_small(console, points)
        figures = {"small": [asdict(point) for point in points]}
    else:
        figures = measure_table(console, cases, options)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
