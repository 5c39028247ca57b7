"""`subquad sweep`: tune every mechanism over one grid, with equally many trials each."""

from __future__ import annotations

from typing import Annotated

import typer

from subquad.cli.options import (
    DEFAULT_OUTPUT,
    Data,
    DryRun,
    Force,
    Json,
    MixersOption,
    Output,
    PresetOption,
    Seed,
    Seeds,
    TaskOption,
)


def command(
    grid: Annotated[
        list[str],
        typer.Option(
            "--grid",
            help="What to vary, once for each: a training setting, learning_rate=1e-3,3e-4, or of one mechanism alone "
            "an option or a setting, local.window=9,17.",
        ),
    ],
    task: TaskOption = "listops",
    preset: PresetOption = "quick",
    mixers: MixersOption = None,
    seeds: Seeds = 1,
    seed: Seed = 0,
    output: Output = DEFAULT_OUTPUT,
    data: Data = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train every mechanism at every point of a grid, write records and report, and choose each one's best trial.

    The validation score chooses, and dense attention is tuned like the others. Every mechanism gets equally many
    trials, or nothing is run. Interrupted? Run the same command again: what is recorded stays.
    """
    from subquad.cli.console import waiting

    with waiting("loading torch"):
        from subquad.benchmark.grid import make_trials, read_axes
        from subquad.benchmark.mixers import parse_mixers
        from subquad.benchmark.sweep import plan_sweep
        from subquad.cli.comparison import check_fit, make_request, prepare_data, show_plan
        from subquad.cli.sweep_results import run_sweep

    axes = read_axes(grid)
    request = make_request(
        task=task,
        preset=preset,
        mixers=[] if mixers is None else parse_mixers(mixers),
        seeds=tuple(range(seed, seed + seeds)),
        output=output,
        data=data,
        force=force,
    ).with_dense()
    trials = make_trials(axes, request.mixers, request.preset)
    check_fit([trial.set_up.mixer for trial in trials] if mixers is not None else [], request.preset)
    task_data = prepare_data(request)
    if dry_run:
        show_plan(plan_sweep(request, trials, task_data), task_data, as_json=as_json)
    else:
        run_sweep(request, trials, task_data, grid=grid, as_json=as_json)
