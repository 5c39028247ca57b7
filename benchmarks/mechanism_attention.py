"""Mechanisms that choose keys, compress them or replace the softmax, against fused dense attention.

    python benchmarks/mechanism_attention.py                                 every row at 4,096 and 16,384 tokens
    python benchmarks/mechanism_attention.py --rows linear topk --lengths 4096
    python benchmarks/mechanism_attention.py --scaling                       time per token and peak memory

What the columns mean stands in `attention_rows.py`. Timed is what a mixer runs between its projections, feature maps,
hashing and sorting included; useful are the operations of its price. The tests hold results and gradients against the
definitions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from attention_rows import measure_table
from mechanism_cases import CASES, LINEAR, find
from sampling import describe_machine, prepare_torch, result_console, sampling_options, write_figures
from scaling import measure_scaling, print_scaling

MOST_SPREAD = 0.35
"""How much more the dearest token of a linear mechanism may cost than the cheapest, from 8,192 to 65,536 tokens."""


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = sampling_options(__doc__)
    parser.add_argument("--scaling", action="store_true", help="time per token and peak memory, lengths 8192 to 65536")
    parser.add_argument("--lengths", type=int, nargs="+", help="instead of those of the mode")
    parser.add_argument("--rows", nargs="+", choices=CASES, metavar="ROW", help=f"of {', '.join(CASES)}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the figures where asked."""
    options, console = parse_options(arguments), result_console()
    prepare_torch(options.threads)
    describe_machine(console)
    if options.scaling:
        report = measure_scaling(options.rows or LINEAR, find, options)
        print_scaling(console, report, most_spread=MOST_SPREAD)
        figures: dict[str, object] = {"scaling": [asdict(method) for method in report]}
    else:
        figures = measure_table(console, [CASES[name] for name in options.rows or CASES], options)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
