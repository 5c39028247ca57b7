"""`subquad run`: one training run of one mechanism."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.options import DEFAULT_OUTPUT, Data, DryRun, Force, Json, Output, PresetOption, Seed, TaskOption


def command(
    mixer: Annotated[
        str,
        typer.Option(
            "--mixer", help="Name, name:option=value, or ./file.py:ConfigClass; in an encoder-decoder, the decoder's."
        ),
    ],
    task: TaskOption = "listops",
    preset: PresetOption = "quick",
    seed: Seed = 0,
    output: Output = DEFAULT_OUTPUT,
    data: Data = None,
    save_model: Annotated[
        Path | None,
        typer.Option(
            "--save-model", help="New folder for the model with the best validation score.", show_default="not kept"
        ),
    ] = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> int:
    """Train one mechanism once and write its record; the exit code is 1 if no score came of it."""
    from subquad.cli.console import waiting

    with waiting("loading torch"):
        from subquad.benchmark.compare import plan_comparison
        from subquad.cli.comparison import make_request, parse_single_mixer, prepare_data, run_once, show_plan

    request = make_request(
        task=task,
        preset=preset,
        mixers=[parse_single_mixer(mixer)],
        seeds=(seed,),
        output=output,
        data=data,
        force=force,
        save_model=save_model,
    )
    task_data = prepare_data(request)
    if dry_run:
        show_plan(plan_comparison(request, task_data), task_data, as_json=as_json)
        return 0
    return run_once(request, task_data, as_json=as_json)
