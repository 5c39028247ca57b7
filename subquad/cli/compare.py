"""`subquad compare`: train, prove and profile mechanisms under one budget, and say which one to use."""

from __future__ import annotations

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
    """Train every named mechanism under one budget, profile it, write records and report, and name a winner.

    Interrupted? Run the same command again: what is recorded stays, and a run goes on from its last checkpoint.
    """
    from subquad.cli.console import waiting

    with waiting("loading torch"):
        from subquad.benchmark.compare import plan_comparison
        from subquad.benchmark.mixers import parse_mixers
        from subquad.cli.comparison import make_request, prepare_data, run_comparison, show_plan

    request = make_request(
        task=task,
        preset=preset,
        mixers=[] if mixers is None else parse_mixers(mixers),
        seeds=tuple(range(seed, seed + seeds)),
        output=output,
        data=data,
        force=force,
    ).with_dense()
    task_data = prepare_data(request)
    if dry_run:
        show_plan(plan_comparison(request, task_data), task_data, as_json=as_json)
    else:
        run_comparison(request, task_data, as_json=as_json)
