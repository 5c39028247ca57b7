"""`subquad show`: one mechanism, with everything that is known before it is measured."""

from __future__ import annotations

from typing import Annotated

import typer

from subquad.cli.options import Json


def command(
    name: Annotated[str, typer.Argument(help="Name, name:option=value, or ./file.py:ConfigClass.")],
    options: Annotated[
        list[str] | None, typer.Option("--set", help="An option as name=value; may be repeated.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens, for the price.")] = 4096,
    embed_dim: Annotated[int, typer.Option(help="Width of the layer.")] = 512,
    num_heads: Annotated[int, typer.Option(help="Heads of the layer.")] = 8,
    causal: Annotated[bool, typer.Option("--causal", help="Price the causal form.")] = False,
    picture_length: Annotated[int, typer.Option("--picture", help="Tokens in the picture of who attends whom.")] = 32,
    as_json: Json = False,
) -> None:
    """Show a mechanism: paper, formula, options, traits, price at a length, and who attends whom."""
    from subquad.cli.console import output_console, print_document, waiting

    with waiting(f"reading {name}"):
        from subquad.cli.mechanism_page import document, read_mechanism, render

        shown = read_mechanism(
            name,
            options or [],
            length=length,
            embed_dim=embed_dim,
            num_heads=num_heads,
            causal=causal,
            picture_length=picture_length,
        )
    if as_json:
        print_document(document(shown))
    else:
        console = output_console()
        console.print(render(shown, console.width))
