"""What the verbs that train do once their options are read: request, data, plan, work, results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from subquad.benchmark.compare import compare, plan_comparison
from subquad.benchmark.data import data_directory
from subquad.benchmark.environment import hardware_name
from subquad.benchmark.mixers import NamedMixer, parse_mixer
from subquad.benchmark.profiler import profile_dims
from subquad.benchmark.request import Request
from subquad.benchmark.runs import PlannedRun, train
from subquad.benchmark.saving import check_free
from subquad.benchmark.timing import matmul_flops_per_second
from subquad.build import list_mixers
from subquad.cli.console import output_console, plain_table, print_document, progress_console
from subquad.cli.observer import BarObserver
from subquad.cli.progress import Progress
from subquad.cli.results import print_results, results_document
from subquad.config import write_option
from subquad.records import units
from subquad.records.atomic import check_writable
from subquad.records.comparison import Protocol
from subquad.records.queries import comparisons
from subquad.records.store import read_all, read_run
from subquad.report.page import write_report
from subquad.tasks.base import TaskData
from subquad.tasks.registry import load_task
from subquad.training.presets import Preset, load_preset

USEFUL_SHARE = 0.2
"""Share of the machine's matrix-product rate that training reaches; for the time that --dry-run expects."""


def make_request(
    *,
    task: str,
    preset: str,
    mixers: Sequence[NamedMixer],
    seeds: tuple[int, ...],
    output: Path,
    data: Path | None,
    force: bool,
    save_model: Path | None = None,
) -> Request:
    """Check everything that can be checked before any work.

    Args:
        task: its name.
        preset: its name, or the path of a user's own.
        mixers: have to be fit for the preset's profile. None stands for all; then one that isn't fit gets a row that
            says so.
        seeds: of the runs.
        output: folder of the records.
        data: folder with the user's own data, or None.
        force: make again what is recorded.
        save_model: folder for the model of a single run, or None.

    Raises:
        ValueError: an unknown name or option, an output that can't be written.
    """
    load_task(task)
    settings = load_preset(task, preset)
    check_fit(mixers, settings)
    check_writable(output)
    if save_model is not None:
        check_free(save_model)
    directory = data if data is not None else data_directory(output, settings)
    return Request(settings, tuple(mixers) or _every_mixer(), seeds, output, directory, data is None, force, save_model)


def parse_single_mixer(text: str) -> NamedMixer:
    """The mixer of `--mixer`, which is one.

    Raises:
        ValueError: as `parse_mixer`; where there is a comma, with the verb that takes several.
    """
    try:
        return parse_mixer(text)
    except ValueError as error:
        if "," not in text:
            raise
        raise ValueError(
            f"one run trains one mechanism; for several: subquad compare --mixers {text} ({error})"
        ) from error


def check_fit(mixers: Sequence[NamedMixer], preset: Preset) -> None:
    """Refuse mechanisms that don't go with the sizes of the preset's profile.

    Raises:
        ValueError: one of them doesn't.
    """
    for mixer in mixers:
        profile_dims(mixer.config, preset.profile)


def prepare_data(request: Request) -> TaskData[Any]:
    """Read or generate the task's data.

    Raises:
        ValueError: data that can't be read.
    """
    preset, loader = request.preset, load_task(request.preset.task)
    with Progress(progress_console()) as bars:
        bar = bars.start(f"data {preset.task}, {preset.data.name}")
        if request.generated:
            data = loader.prepare(request.data, preset.data, progress=lambda done, total: bar.update(done, total=total))
        else:
            data = loader.read(request.data, preset.data)
        bar.finish(" / ".join(f"{len(split):,}" for split in data.splits.values()) + " examples")
    return data


def show_plan(planned: Sequence[PlannedRun], data: TaskData[Any], *, as_json: bool) -> None:
    """Print the runs, their sizes, and the time they will take on this machine, roughly."""
    rate = matmul_flops_per_second()
    rows = [_plan_row(run, rate) for run in planned]
    minutes = sum(row["expected_minutes"] for row in rows if row["state"] == "to run")
    if as_json:
        print_document({"runs": rows, "expected_minutes": round(minutes, 1)})
        return
    cells = [_plan_cells(row) for row in rows]
    console, table = output_console(), plain_table()
    columns = [name for name in cells[0] if name != "changed settings" or any(row[name] != "-" for row in cells)]
    for column in columns:
        table.add_column(column, justify="right" if column in ("seed", "parameters", "time") else "left")
    for row in cells:
        table.add_row(*(row[column] for column in columns))
    console.print(data.title, table, sep="\n", markup=False)
    about = units.seconds(60 * minutes)
    console.print(f"About {about} of training on this machine; proofs and profiles come on top.")


def run_comparison(request: Request, data: TaskData[Any], *, as_json: bool) -> None:
    """Compare, write the report on all that is recorded, print table and recommendation of this comparison."""
    with Progress(progress_console()) as bars:
        compare(request, data, BarObserver(bars))
    page = write_report(request.output)
    records = read_all(request.output)
    found = [each for each in comparisons(records) if _answers(each.protocol, request, data)]
    if as_json:
        print_document(results_document(records, page, found))
    else:
        print_results(output_console(), records, page, found)


def _answers(protocol: Protocol, request: Request, data: TaskData[Any]) -> bool:
    """Whether these runs are of the request, as against others in its folder."""
    found = protocol.hardware, protocol.task, protocol.data_hash, protocol.preset
    return found == (hardware_name(), data.name, data.data_hash, request.preset.name)


def run_once(request: Request, data: TaskData[Any], *, as_json: bool) -> int:
    """Train what the request names, print where the records lie, and return the exit code: 1 if no score came of it."""
    planned = plan_comparison(request, data)
    if request.save_model is not None and not request.force and any(run.done for run in planned):
        raise ValueError("--save-model: this run is recorded already and its model was not kept; add --force")
    with Progress(progress_console()) as bars:
        paths = train(request, planned, data, BarObserver(bars))
    saved = request.save_model is not None and request.save_model.exists()
    if as_json:
        print_document({"records": [str(path) for path in paths], "model": str(request.save_model) if saved else None})
    else:
        for path in paths:
            output_console().print(f"record: {path}", soft_wrap=True, markup=False)
        if saved:
            output_console().print(f"model: {request.save_model}", soft_wrap=True, markup=False)
    return 0 if all(read_run(path).metric is not None for path in paths) else 1


def _every_mixer() -> tuple[NamedMixer, ...]:
    return tuple(parse_mixer(name) for name in list_mixers())


def _plan_row(run: PlannedRun, flops_per_second: float) -> dict[str, Any]:
    seconds = run.training_flops / (USEFUL_SHARE * flops_per_second)
    obstacle = run.sketch.obstacle and f"{run.sketch.status.value}: {run.sketch.obstacle}"
    state = "recorded" if run.done else obstacle or "to run"
    return {
        "mixer": run.plan.mixer.text,
        "changed_settings": dict(run.plan.preset.changed),
        "seed": run.plan.seed,
        "parameters": None if obstacle else run.sketch.parameters,
        "expected_minutes": round(seconds / 60, 2),
        "state": state,
    }


def _plan_cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "mixer": row["mixer"],
        "changed settings": " ".join(write_option(*changed) for changed in row["changed_settings"].items()) or "-",
        "seed": str(row["seed"]),
        "parameters": "-" if row["parameters"] is None else f"{row['parameters']:,}",
        "time": "-" if row["parameters"] is None else units.seconds(60 * row["expected_minutes"]),
        "state": row["state"],
    }
