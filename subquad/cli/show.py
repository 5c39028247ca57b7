"""`subquad show`: one mechanism with everything that is known before it is measured, or one pattern."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from subquad.cli.options import Json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from subquad.cli.mechanism_page import Shown
    from subquad.cli.pattern_page import ShownPattern
    from subquad.drawing import Drawing

_NAME = (
    "Name, name:option=value, or ./file.py:ConfigClass; or a pattern in quotes: "
    "'Causal() & (Window(7, 0) | Strided(8))'."
)
_LENGTH = (
    "Tokens, for the price, by default 4096; for the error, by default several lengths; or to count what a pattern "
    "shows, by default those of its picture."
)
_ERROR = "Measure how far the mechanism is from softmax attention, on random queries, keys and values."
_SWEEP = "With --error: values of an option to compare, as features=64,128,256; may be repeated."
_QKV = "With --error: a safetensors file with your own q, k and v, each (B, H, L, E) or (H, L, E)."
_PICTURE = "Tokens in the picture of who attends whom; by default 32, of a pattern as many as show its structure."


def command(
    name: Annotated[str, typer.Argument(help=_NAME)],
    options: Annotated[
        list[str] | None, typer.Option("--set", help="An option as name=value; may be repeated.")
    ] = None,
    length: Annotated[int | None, typer.Option(help=_LENGTH)] = None,
    embed_dim: Annotated[int, typer.Option(help="Width of the layer.")] = 512,
    num_heads: Annotated[int, typer.Option(help="Heads of the layer.")] = 8,
    causal: Annotated[bool, typer.Option("--causal", help="Price the causal form.")] = False,
    picture_length: Annotated[int | None, typer.Option("--picture", help=_PICTURE)] = None,
    output: Annotated[Path | None, typer.Option(help="Write the picture to this file too: .svg or .png.")] = None,
    dark: Annotated[
        bool, typer.Option("--dark", help="Dark colours in the file; otherwise an SVG follows its reader's scheme.")
    ] = False,
    error: Annotated[bool, typer.Option("--error", help=_ERROR)] = False,
    sweeps: Annotated[list[str] | None, typer.Option("--option", help=_SWEEP)] = None,
    qkv: Annotated[Path | None, typer.Option(help=_QKV)] = None,
    as_json: Json = False,
) -> None:
    """Show a mechanism: paper, formula, options, traits, price at a length; or a pattern; and who attends whom."""
    from subquad.cli.console import output_console, print_document, progress_console, waiting

    with waiting(f"reading {name}"):
        from subquad.cli.mechanism_page import read_mechanism
        from subquad.cli.pattern_page import is_pattern, read_pattern
        from subquad.report.drawing_file import check_drawing_path, write_drawing

        if output is not None:
            check_drawing_path(output)
        assignments = options or []
        _check_error_options(error, qkv, sweeps, pattern=is_pattern(name))
        if is_pattern(name):
            sizes = {"length": length, "picture_length": picture_length}
            page = _of_pattern(read_pattern(name, assignments, causal=causal, **sizes))
        else:
            shown = read_mechanism(
                name,
                assignments,
                length=4096 if length is None else length,
                embed_dim=embed_dim,
                num_heads=num_heads,
                causal=causal,
                picture_length=32 if picture_length is None else picture_length,
            )
            page = _of_mechanism(shown)
            if error:
                page = _with_errors(page, shown, sweeps or [], qkv, length)
        if output is not None:
            write_drawing(page.draw(), output, "dark" if dark else "auto")
    if as_json:
        print_document(page.document())
    else:
        console = output_console()
        console.print(page.render(console.width))
    if output is not None:
        progress_console().print(f"picture: {output}", soft_wrap=True, markup=False)


class _Page(NamedTuple):
    """What is shown: JSON-ready, for a terminal of some width, and as a drawing."""

    document: Callable[[], Any]
    render: Callable[[int], RenderableType]
    draw: Callable[[], Drawing]


def _of_mechanism(shown: Shown) -> _Page:
    from subquad.cli.mechanism_page import document, render
    from subquad.report.pictures import mechanism_drawing

    draw = partial(mechanism_drawing, shown.config.name, shown.pictures, shown.drawn_with)
    return _Page(partial(document, shown), partial(render, shown), draw)


def _with_errors(page: _Page, shown: Shown, sweeps: list[str], qkv: Path | None, length: int | None) -> _Page:
    """The page with one more part."""
    from rich.console import Group

    from subquad.cli.error_table import error_document, read_errors, render_errors
    from subquad.cli.mechanism_page import heading

    price = shown.price
    sizes = (price.num_heads, price.embed_dim // price.num_heads)
    points = read_errors(shown.config, sweeps=sweeps, qkv=qkv, length=length, sizes=sizes, causal=price.causal)
    title = heading("Error against softmax attention")
    return page._replace(
        document=lambda: page.document() | {"errors": error_document(points)},
        render=lambda width: Group(page.render(width), title, render_errors(points)),
    )


def _check_error_options(error: bool, qkv: Path | None, sweeps: list[str] | None, *, pattern: bool) -> None:
    if error and pattern:
        raise ValueError("--error speaks of a mechanism; a pattern approximates nothing")
    for option, given in (("--qkv", qkv), ("--option", sweeps)):
        if given and not error:
            raise ValueError(f"{option} goes with --error")


def _of_pattern(shown: ShownPattern) -> _Page:
    from subquad.cli.pattern_page import document, render

    return _Page(partial(document, shown), partial(render, shown), lambda: shown.drawing)
