"""`subquad profile`: time, memory and FLOPs over lengths on this machine, against fused dense attention."""

from __future__ import annotations

from typing import Annotated

import typer

from subquad.cli.options import DEFAULT_OUTPUT, DryRun, Force, Json, MixersOption, Output
from subquad.records.conventions import MAX_SAMPLES


def command(
    mixers: MixersOption = None,
    lengths: Annotated[str, typer.Option(help="Lengths in tokens, separated by commas.")] = "256,512,1024,2048,4096",
    embed_dim: Annotated[int, typer.Option(min=1, help="Width of the layer.")] = 512,
    num_heads: Annotated[int, typer.Option(min=1, help="Heads of the layer.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, max=MAX_SAMPLES, help="Samples of each measurement.")] = 7,
    causal: Annotated[bool, typer.Option("--causal", help="Profile the causal forms.")] = False,
    output: Output = DEFAULT_OUTPUT,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure forward and backward time, memory and the length from which a mechanism beats dense attention."""
    from subquad.cli.console import waiting

    with waiting("loading torch"):
        from subquad.cli.profiles import run_profile

    run_profile(
        mixers=mixers,
        lengths=lengths,
        sizes={"embed_dim": embed_dim, "num_heads": num_heads, "batch_size": batch_size, "rounds": rounds},
        causal=causal,
        output=output,
        force=force,
        dry_run=dry_run,
        as_json=as_json,
    )
