"""The verbs: which there are, what each is for, and how one is called.

A verb is a module with a function `command`, whose annotated parameters are its options. The module is imported when
the verb is called, never to list the verbs: `subquad --help` answers at once.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

import subquad
from subquad.cli.console import ACCENT, output_console
from subquad.cli.errors import UsageError
from subquad.config import nearest


class Verb(NamedTuple):
    """The module of a verb, what it is for in one line, and the panel of the help it stands in."""

    module: str
    purpose: str
    panel: str


_CHOOSE, _KNOW = "Find the mechanism that pays", "Look at mechanisms"
_USE, _PREPARE = "Use a model", "Prepare"

VERBS = {
    "compare": Verb("subquad.cli.compare", "Train, prove and profile mechanisms, and say which one to use.", _CHOOSE),
    "sweep": Verb("subquad.cli.sweep", "Tune every mechanism over one grid, with equally many trials.", _CHOOSE),
    "run": Verb("subquad.cli.run", "Train one mechanism once.", _CHOOSE),
    "profile": Verb("subquad.cli.profile", "Measure time and memory over lengths on this machine.", _CHOOSE),
    "report": Verb("subquad.cli.report", "Write the page and print the tables of what is recorded.", _CHOOSE),
    "recommend": Verb("subquad.cli.recommend", "Say which mechanism to use, from what is recorded.", _CHOOSE),
    "list": Verb("subquad.cli.list_mixers", "All mechanisms by family, with what each can do.", _KNOW),
    "show": Verb("subquad.cli.show", "One mechanism or pattern: paper, formula, options, price, picture.", _KNOW),
    "generate": Verb("subquad.cli.generate", "Write text with a model that `run` saved.", _USE),
    "data": Verb("subquad.cli.data", "Generate or check the data of a task.", _PREPARE),
    "doctor": Verb("subquad.cli.doctor", "Check this machine and this installation.", _PREPARE),
}

_FIRST_COMMAND = "subquad compare --task listops --preset quick --mixers full,local,linear"
_HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


class _LazyGroup(TyperGroup):
    """A group that lists its verbs without importing them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        verb = VERBS.get(cmd_name)
        return verb and TyperCommand(name=cmd_name, help=verb.purpose, rich_help_panel=verb.panel, callback=None)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        print_help(ctx.command.help or "", self.get_params(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str, Any, list[str]]:
        name, *rest = args
        if name not in VERBS:
            raise UsageError(f"unknown command {name!r}; {nearest(name, VERBS)}")
        return name, _load(name), rest


def _load(name: str) -> Any:
    app = typer.Typer(add_completion=False)
    app.command(name, context_settings=_HELP_OPTIONS)(importlib.import_module(VERBS[name].module).command)
    return typer.main.get_command(app)


def print_help(purpose: str, options: Sequence[Any]) -> None:
    """Print what `subquad --help` shows: verbs by what one wants to do, then the options before a verb."""
    usage = Text.assemble("subquad ", ("VERB", ACCENT), " [OPTIONS]      subquad ", ("VERB", ACCENT), " --help")
    console = output_console()
    console.print(Text(purpose, "bold"), Padding(usage, (1, 0, 0, 0)))
    for panel in dict.fromkeys(verb.panel for verb in VERBS.values()):
        verbs = [(name, verb.purpose) for name, verb in VERBS.items() if verb.panel == panel]
        console.print("", Text(panel, "bold"), _described(verbs), sep="\n")
    described = [(", ".join(option.opts), option.help) for option in options]
    console.print("", Text("Options", "bold"), _described(described), sep="\n")
    console.print("", Text.assemble(("Start with", "bold"), "\n  ", _FIRST_COMMAND), sep="\n")


def _described(rows: Sequence[tuple[str, str]]) -> Padding:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style=ACCENT, width=max(8, *(len(name) for name, _ in rows)))
    for name, description in rows:
        table.add_row(name, description)
    return Padding(table, (0, 0, 0, 2))


def run_verb(arguments: list[str]) -> int:
    """Run a verb and return the exit code; without arguments, print the help.

    Raises:
        UsageError: a verb or option that isn't there, or a malformed value.
        Exception: whatever the verb raised.
    """
    app = typer.Typer(cls=_LazyGroup, context_settings=_HELP_OPTIONS)
    app.callback()(_subquad)
    try:
        outcome = typer.main.get_command(app).main(arguments or ["--help"], prog_name="subquad", standalone_mode=False)
    except typer.TyperException as error:
        command = f"subquad {arguments[0]}" if arguments and arguments[0] in VERBS else "subquad"
        hint = f"see `{command} --help`"
        raise UsageError(f"{_plain(error.format_message())}; {hint}") from error
    return outcome if isinstance(outcome, int) else 0


def _plain(message: str) -> str:
    """Typer's message in the words of our own."""
    unknown = re.fullmatch(r"No such option: (\S+)(?: \(Possible options: (.+)\))?", message)
    if unknown is None:
        return message[:1].lower() + message[1:].rstrip(".")
    guess = f" (did you mean {unknown[2].replace(', ', ' or ')}?)" if unknown[2] else ""
    return f"unknown option {unknown[1]}{guess}"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(subquad.__version__)
        raise typer.Exit


def _subquad(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="After an error, print where it came from.")] = False,
) -> None:
    """Which efficient-Transformer mechanism pays for your task, length and machine: measured here, fairly."""
