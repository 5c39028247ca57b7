"""`subquad list`: every mechanism by family, with what it can do. The registry is loaded when the verb runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from subquad.cli.console import ACCENT, GOOD, NO, QUIET, UNKNOWN, YES, output_console, print_document, waiting
from subquad.cli.options import Json
from subquad.config import nearest

FAMILIES = ("dense", "sparse", "factorised", "recurrent", "attention-free", "conditional")
"""The order of families; any others follow."""


@dataclass(frozen=True)
class Entry:
    """A mechanism with its default options; `traits` is None where an option has no default."""

    name: str
    family: str
    placement: str
    summary: str
    traits: dict[str, bool] | None


def command(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    trait: Annotated[list[str] | None, typer.Option(help="Only those with this trait; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """List the mechanisms by family, with what each can do with its default options."""
    with waiting("reading the mechanisms"):
        entries = select(all_entries(), family, trait or [])
    if as_json:
        print_document([asdict(entry) for entry in entries])
        return
    console = output_console()
    if not entries:
        console.print(f"No mechanism{f' of the family {family}' if family else ''} has {' and '.join(trait or [])}.")
        return
    console.print(render(entries))


def all_entries() -> list[Entry]:
    """Every registered mechanism, by family and name."""
    from subquad.benchmark.mechanism_card import describe_options, read_documentation
    from subquad.build import list_mixers
    from subquad.registry import MIXERS

    entries = []
    for name in list_mixers():
        config_class = MIXERS.lookup(name)
        has_defaults = not any(option.required for option in describe_options(config_class))
        traits = asdict(config_class().traits) if has_defaults else None
        summary = read_documentation(config_class).summary
        entries.append(Entry(name, config_class.family, config_class.placement, summary, traits))
    return sorted(entries, key=lambda entry: (_rank(entry.family), entry.family, entry.name))


def _rank(family: str) -> int:
    return FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)


def select(entries: list[Entry], family: str | None, traits: list[str]) -> list[Entry]:
    """The entries of a family that have all these traits.

    Raises:
        ValueError: unknown family or trait.
    """
    families, known = {entry.family for entry in entries}, _trait_names(entries)
    if family is not None and family not in families:
        raise ValueError(f"unknown family {family!r}; {nearest(family, families)}")
    for trait in traits:
        if trait not in known:
            raise ValueError(f"unknown trait {trait!r}; {nearest(trait, known)}")
    of_family = [entry for entry in entries if family in (None, entry.family)]
    return [entry for entry in of_family if all((entry.traits or {}).get(trait) for trait in traits)]


def _trait_names(entries: list[Entry]) -> list[str]:
    return list(dict.fromkeys(trait for entry in entries for trait in entry.traits or ()))


def render(entries: list[Entry]) -> Group:
    """The table: names of the traits as a stair over their columns, then a block of rows for each family."""
    traits = _trait_names(entries)
    indent = max(len(entry.name) for entry in entries) + 4
    table = Table.grid(padding=(0, 2, 0, 0))
    for width in (indent - 2, 2 * len(traits), len("sublayer")):
        table.add_column(no_wrap=True, min_width=width)
    table.add_column()
    for family in dict.fromkeys(entry.family for entry in entries):
        table.add_row(Text(family, f"bold {ACCENT}"))
        for entry in entries:
            if entry.family == family:
                table.add_row(f"  {entry.name}", _marks(entry, traits), Text(entry.placement, QUIET), entry.summary)
    return Group(*_stair(traits, indent), table)


def _stair(traits: list[str], indent: int) -> list[Text]:
    return [
        Text.assemble(" " * indent, ("│ " * index, QUIET), (f"╭ {trait.replace('_', ' ')}", "bold"))
        for index, trait in enumerate(traits)
    ]


def _marks(entry: Entry, traits: list[str]) -> Text:
    text = Text()
    for trait in traits:
        value = None if entry.traits is None else entry.traits[trait]
        mark, style = {True: (YES, GOOD), False: (NO, QUIET), None: (UNKNOWN, QUIET)}[value]
        text.append(mark, style).append(" ")
    return text
