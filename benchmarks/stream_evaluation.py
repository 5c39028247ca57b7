"""Evaluation of a stream by Transformer-XL, against a window that is computed again for every token.

    python benchmarks/stream_evaluation.py --figure stream-evaluation.svg

Both predict every token from the same number of tokens before it, the attention length. With a memory a segment of 128
tokens is computed at once and read by the next ones; the window, as evaluation was before (arXiv 1901.02860, section
4.5), is computed whole to predict its one last token. Batch 1, float32, random weights. The columns "early" and "late"
tell whether a token costs the same however long the stream has become.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.text import Text
from sampling import describe_machine, prepare_torch, result_console, write_figures

from subquad.cli.console import BAD, GOOD, plain_table, waiting
from subquad.models import SubquadConfig, SubquadForCausalLM
from subquad.records import units

LENGTHS = (64, 128, 256, 512, 1024, 2048)
SEGMENT = 128
TARGET_LENGTH, TARGET = 512, 100.0
MOST_APART = 0.15


@dataclass(frozen=True)
class Point:
    """One attention length: median seconds per token, early and late in a stream, and with the window."""

    length: int
    early_seconds: float
    late_seconds: float
    window_seconds: float

    @property
    def ratio(self) -> float:
        """How many times more the window costs."""
        return self.window_seconds / self.late_seconds

    @property
    def apart(self) -> float:
        """By how much early and late differ."""
        return abs(self.late_seconds / self.early_seconds - 1)


def measure(length: int, options: argparse.Namespace) -> Point:
    """Time by turns a segment behind a full memory, one `options.tokens` tokens later, and a window."""
    torch.manual_seed(0)
    config = SubquadConfig(
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        intermediate_size=4 * options.width,
        mixer={"name": "transformer_xl", "memory_length": length},
        positions="none",
    )
    model = SubquadForCausalLM(config).eval()
    with torch.no_grad():
        early = _read(model, None, max(length, SEGMENT))
        late = _read(model, early, options.tokens)
        taken = [
            (_seconds_a_token(model, early), _seconds_a_token(model, late), _seconds_of_window(model, length))
            for _ in range(options.samples)
        ]
    return Point(length, *(statistics.median(seconds) for seconds in zip(*taken, strict=True)))


def _read(model: SubquadForCausalLM, cache: object, tokens: int) -> object:
    """The cache after so many tokens more."""
    for _ in range(-(-tokens // SEGMENT)):
        cache = model(torch.randint(0, 256, (1, SEGMENT)), past_key_values=cache, use_cache=True).past_key_values
    return cache


def _seconds_a_token(model: SubquadForCausalLM, cache: object) -> float:
    """Of one segment; the cache stays as it is."""
    segment = torch.randint(0, 256, (1, SEGMENT))
    start = time.perf_counter()
    model(segment, past_key_values=cache, use_cache=True)
    return (time.perf_counter() - start) / SEGMENT


def _seconds_of_window(model: SubquadForCausalLM, length: int) -> float:
    window = torch.randint(0, 256, (1, length))
    start = time.perf_counter()
    model(window, logits_to_keep=1)
    return time.perf_counter() - start


def draw(points: Sequence[Point], path: Path) -> None:
    """Write the curve, both axes logarithmic, to a .svg or .png that is readable on light and on dark pages."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    lengths, ink = [point.length for point in points], "#808080"
    for color, marker, label, seconds in (
        ("#d1495b", "s", "window, computed again for every token", [point.window_seconds for point in points]),
        ("#2a7fb8", "o", f"memory, segments of {SEGMENT}", [point.late_seconds for point in points]),
    ):
        axes.loglog(lengths, [1e3 * each for each in seconds], marker=marker, color=color, label=label)
    for point in points:
        axes.annotate(
            units.times(point.ratio),
            (point.length, 1e3 * point.late_seconds),
            (0, -15),
            textcoords="offset points",
            ha="center",
            color=ink,
            fontsize=9,
        )
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("Attention length (tokens)", color=ink)
    axes.set_ylabel("Time per token (ms)", color=ink)
    axes.tick_params(colors=ink)
    axes.grid(color=ink, alpha=0.25)
    for spine in axes.spines.values():
        spine.set_color(ink)
    axes.margins(y=0.15)
    axes.legend(frameon=False, labelcolor=ink)
    figure.savefig(path, transparent=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, a verdict, and draw the curve where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--tokens", type=int, default=16_384, help="of the stream before the late samples (16384)")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--figure", type=Path, help="write the curve to this .svg or .png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    options, console = parser.parse_args(arguments), result_console()
    prepare_torch(options.threads)
    describe_machine(console)
    points = []
    for length in options.lengths:
        with waiting(f"attention length {length:,}"):
            points.append(measure(length, options))
    table = plain_table()
    for heading in ("attention length", "early, ms a token", "late", "window", "window over memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in points:
        seconds = (point.early_seconds, point.late_seconds, point.window_seconds)
        figures = (f"{1e3 * each:.3f}" for each in seconds)
        table.add_row(f"{point.length:,}", *figures, _verdict(point))
    console.print(table)
    worst = max(point.apart for point in points)
    kept = worst <= MOST_APART
    console.print(
        Text(
            f"{'✓' if kept else '✗'} early and late differ by {units.percent(worst)} at most "
            f"({units.percent(MOST_APART, 0)} allowed)",
            GOOD if kept else BAD,
        )
    )
    write_figures(options.json, {"points": [asdict(point) for point in points]})
    if options.figure is not None:
        draw(points, options.figure)


def _verdict(point: Point) -> Text:
    """The ratio, held against the target where there is one."""
    if point.length != TARGET_LENGTH:
        return Text(units.times(point.ratio))
    reached = point.ratio >= TARGET
    return Text(f"{units.times(point.ratio)} ({TARGET:g}× {'✓' if reached else '✗'})", GOOD if reached else BAD)


if __name__ == "__main__":
    main()
