"""What the verb `profile` does once its options are read."""

from __future__ import annotations

from pathlib import Path

from subquad.benchmark.mixers import NamedMixer, parse_mixer, parse_mixers
from subquad.benchmark.profiler import profile_dims
from subquad.benchmark.profiling import find_profiles, profile_mixers
from subquad.benchmark.worker import Worker
from subquad.build import list_mixers
from subquad.cli.console import output_console, plain_table, print_document, progress_console
from subquad.cli.observer import BarObserver
from subquad.cli.progress import Progress
from subquad.records import units
from subquad.records.atomic import check_writable
from subquad.records.conventions import DENSE
from subquad.records.schema import ProfilePoint, ProfileRecord
from subquad.report.page import write_report
from subquad.training.presets import ProfileSettings


def run_profile(
    *,
    mixers: str | None,
    lengths: str,
    sizes: dict[str, int],
    causal: bool,
    output: Path,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measure what isn't recorded yet, write the report, print the figures.

    Raises:
        ValueError: an unknown name or option, or a form that a mechanism doesn't have.
    """
    settings = ProfileSettings(lengths=_parse_lengths(lengths), **sizes)
    every = list_mixers(**_form(causal))
    chosen = [parse_mixer(name) for name in every] if mixers is None else parse_mixers(mixers)
    for mixer in chosen:
        profile_dims(mixer.config, settings, causal=causal)
    if dry_run:
        _print_plan(chosen, settings, as_json=as_json)
        return
    check_writable(output)
    with Progress(progress_console()) as bars, Worker([mixer.text for mixer in chosen]) as worker:
        profile_mixers(chosen, settings, output, worker, BarObserver(bars), causal=causal, force=force)
    records = find_profiles(chosen, settings, output, causal=causal)
    page = write_report(output)
    if as_json:
        documents = [record.model_dump(mode="json") for record in records]
        print_document({"profiles": documents, "report": str(page)})
        return
    _print_profiles(dict(zip([mixer.text for mixer in chosen], records, strict=True)), settings)
    output_console().print(f"Report: {page}", soft_wrap=True, markup=False)


def _form(causal: bool) -> dict[str, bool]:
    return {"causal": True} if causal else {}


def _parse_lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise ValueError(f"--lengths: expected whole numbers separated by commas, got {text!r}") from error


def _print_plan(mixers: list[NamedMixer], settings: ProfileSettings, *, as_json: bool) -> None:
    names = [mixer.text for mixer in mixers]
    if as_json:
        print_document({"mixers": names, "lengths": list(settings.lengths), "rounds": settings.rounds})
        return
    lengths = ", ".join(f"{length:,}" for length in settings.lengths)
    console = output_console()
    console.print(f"{', '.join(names)}: {settings.rounds} rounds at {lengths} tokens", soft_wrap=True, markup=False)


def _print_profiles(records: dict[str, ProfileRecord], settings: ProfileSettings) -> None:
    table = plain_table()
    table.add_column("forward + backward", no_wrap=True)
    for length in settings.lengths:
        table.add_column(f"{length:,}", justify="right", no_wrap=True)
    table.add_column("faster from", justify="right")
    table.add_column("kept at the longest", justify="right")
    for text, record in records.items():
        points: dict[int, ProfilePoint] = {point.length: point for point in record.points}
        cells = [_cell(points.get(length)) for length in settings.lengths]
        kept = units.size(record.points[-1].saved_bytes) if record.points else "-"
        table.add_row(text, *cells, _crossover(record), kept)
    note = "Medians; in brackets how many times faster than fused dense attention in the same run."
    output_console().print(table, note, sep="\n")


def _cell(point: ProfilePoint | None) -> str:
    if point is None:
        return "-"
    seconds = point.forward_backward.median_seconds
    return f"{units.seconds(seconds)} ({point.dense_forward_backward.median_seconds / seconds:.2g}x)"


def _crossover(record: ProfileRecord) -> str:
    if record.mixer_name == DENSE:
        return ""
    return "never here" if record.crossover_length is None else f"{record.crossover_length:,.0f} tokens"
