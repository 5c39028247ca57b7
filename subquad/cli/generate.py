"""`subquad generate`: text from a saved causal language model of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.options import Json


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="What `subquad run --save-model` wrote.")],
    prompt: Annotated[str, typer.Option("--prompt", help="What the text begins with.")] = "",
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="A file with the beginning.", show_default="none")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many bytes to write.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest byte; above 1: wilder.")] = 1.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Choose among the k likeliest bytes.", show_default="all")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Choose among the likeliest that make up this share.", show_default="all"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same text.")] = 0,
    as_json: Json = False,
) -> None:
    """Write text byte by byte, as it comes; in constant memory where the mechanism's state has a constant size."""
    from subquad.cli.console import waiting

    with waiting("loading torch"):
        from subquad.cli.generation import Wish, generate

    wish = Wish(tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    generate(model, prompt=prompt, prompt_file=prompt_file, wish=wish, as_json=as_json)
