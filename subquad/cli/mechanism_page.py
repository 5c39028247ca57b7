"""What `subquad show` prints of a mechanism, gathered and laid out."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from subquad.benchmark.mechanism_card import (
    Documentation,
    OptionCard,
    describe_options,
    draw_pictures,
    picture_config,
    read_documentation,
)
from subquad.benchmark.mixers import parse_mixer
from subquad.cli.console import ACCENT, GOOD, NO, QUIET, YES, plain_table
from subquad.cli.picture import side_by_side
from subquad.cli.price import Price, price_of
from subquad.config import config_fields
from subquad.interface import MixerConfig, Traits
from subquad.records import units
from subquad.records.conventions import DENSE
from subquad.records.mechanisms import Picture


@dataclass(frozen=True)
class Shown:
    """A mechanism as it is shown.

    Attributes:
        config: the mechanism with its options.
        documentation: the prose.
        options: its options, described.
        price: what it costs, beside dense attention.
        pictures: form to picture of who attends whom.
        drawn_with: option to value, of those that were made small for the pictures.
    """

    config: MixerConfig
    documentation: Documentation
    options: tuple[OptionCard, ...]
    price: Price
    pictures: dict[str, Picture]
    drawn_with: dict[str, Any]


def read_mechanism(
    name: str,
    assignments: list[str],
    *,
    length: int,
    embed_dim: int,
    num_heads: int,
    causal: bool,
    picture_length: int,
) -> Shown:
    """Gather everything about a mechanism.

    Args:
        name: as `parse_mixer` reads it.
        assignments: more options, each as name=value.
        length: tokens, for the price.
        embed_dim: width of the layer.
        num_heads: heads of the layer.
        causal: price the causal form; a mechanism without a bidirectional one is priced causal anyway.
        picture_length: tokens in the pictures.

    Raises:
        ValueError: an unknown name or option, a bad value, or a form or sizes that the mechanism doesn't have.
    """
    text = ":".join([name, *assignments])
    config = parse_mixer(text).config
    only_causal = not config.traits.bidirectional
    price = price_of(config, length=length, embed_dim=embed_dim, num_heads=num_heads, causal=causal or only_causal)
    chosen = [part.partition("=")[0] for part in text.split(":")[1:] if "=" in part]
    pictures = zip(("bidirectional", "causal"), draw_pictures(config, length=picture_length, keep=chosen), strict=True)
    asked, drawn = config_fields(config), config_fields(picture_config(config, keep=chosen))
    return Shown(
        config=config,
        documentation=read_documentation(type(config)),
        options=describe_options(type(config)),
        price=price,
        pictures={form: picture for form, picture in pictures if picture is not None},
        drawn_with={option: value for option, value in drawn.items() if value != asked[option]},
    )


def document(shown: Shown) -> dict[str, Any]:
    """Everything, JSON-ready."""
    config = shown.config
    values = config_fields(config)
    return {
        "name": config.name,
        "family": config.family,
        "placement": config.placement,
        **asdict(shown.documentation),
        "options": [
            {**asdict(option), "default": _json_ready(option.default), "value": values[option.name]}
            for option in shown.options
        ],
        "traits": asdict(config.traits),
        "price": shown.price.document(),
        "pictures": {form: list(picture.rows) for form, picture in shown.pictures.items()},
        "drawn_with": shown.drawn_with,
    }


def _json_ready(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def render(shown: Shown, width: int) -> Group:
    """The page, for a terminal of `width` columns."""
    config, prose = shown.config, shown.documentation
    title = Text.assemble((config.name, f"bold {ACCENT}"), (f"   {config.family}, {config.placement}", QUIET))
    parts: list[RenderableType] = [title, Text(prose.summary, "bold"), "", _facts(prose)]
    if prose.formula:
        parts += [heading("Formula"), Padding(Text(_fitted(prose.formula, width - 2)), (0, 0, 0, 2))]
    parts += [heading("Options"), _options(shown), heading("Traits"), _traits(config.traits)]
    parts += [
        heading("Price of one layer"),
        _price_setting(shown.price),
        _price_table(config.name, shown.price),
        *_price_notes(config, shown.price),
    ]
    if shown.pictures:
        note = _picture_note(shown)
        pictures = side_by_side(list(shown.pictures.items()), width - 2)
        parts += [heading("Who attends whom"), Padding(Group(note, "", pictures), (0, 0, 0, 2))]
    return Group(*parts)


def heading(text: str) -> Text:
    """The title of a part of the page."""
    return Text(f"\n{text}", f"bold {ACCENT}")


def _fitted(formula: str, width: int) -> str:
    """The formula; a line that is too long is broken where wide gaps separate its parts."""
    lines = formula.splitlines()
    return "\n".join(line if len(line) <= width else re.sub(r"(?<=\S) {4,}", "\n", line) for line in lines)


def _facts(prose: Documentation) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style=ACCENT)
    facts = {"Paper": prose.paper, "Cost": prose.cost.removeprefix("Cost "), "Departures": prose.departures}
    for name, text in facts.items():
        if text:
            table.add_row(name, Text(text))
    return table


def _options(shown: Shown) -> RenderableType:
    if not shown.options:
        return Text("  none", QUIET)
    values = config_fields(shown.config)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(no_wrap=True)
    table.add_column(style=QUIET, max_width=28)
    table.add_column()
    for option in shown.options:
        value = values[option.name]
        changed = "" if option.required or value == _json_ready(option.default) else f" (default {option.default})"
        table.add_row(f"  {option.name}", f"{value}{changed}", Text(option.type), Text(option.description))
    return table


def _traits(traits: Traits) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for trait in describe_options(Traits):
        has = getattr(traits, trait.name)
        mark, style = (f"  {YES}", GOOD) if has else (f"  {NO}", QUIET)
        name = Text(trait.name.replace("_", " "), "none" if has else QUIET)
        table.add_row(Text(mark, style), name, Text(trait.description, QUIET))
    return table


def _price_setting(price: Price) -> Text:
    form = "causal" if price.causal else "bidirectional"
    sizes = f"{_tokens(price.length)}, width {price.embed_dim}, {price.num_heads} heads, {form}, float32"
    return Text(f"  One sequence of {sizes}.", QUIET)


def _price_table(name: str, price: Price) -> Padding:
    cost, dense = price.cost, price.dense_cost
    rows = [
        ("FLOPs, forward", units.magnitude, cost.flops, dense.flops),
        ("kept for backward", units.size, cost.activation_bytes, dense.activation_bytes),
        ("state in generation", units.size, cost.state_bytes, dense.state_bytes),
        ("parameters", units.count, cost.parameters, dense.parameters),
    ]
    table, against = plain_table(), name != DENSE
    for title in ("", name, *((DENSE, f"{name} / {DENSE}") if against else ())):
        table.add_column(title, justify="right" if title else "left")
    for title, write, mine, other in rows:
        if mine or other:
            ratio = f"{mine / other:.2f}" if mine and other else "–"
            table.add_row(title, *([write(mine), write(other), ratio] if against else [write(mine)]))
    return Padding(table, (0, 0, 0, 2))


def _price_notes(config: MixerConfig, price: Price) -> list[Padding]:
    sentences = []
    if config.name != DENSE:
        start = price.cheaper_from
        where = "at no length" if start is None else "at every length" if start == 1 else f"from {_tokens(start)} on"
        sentences.append(f"Fewer FLOPs than dense attention {where}.")
    if config.placement == "sublayer":
        own, dense = price.overtakes_feedforward, price.dense_overtakes_feedforward
        text = f"As many FLOPs as the feed-forward beside it (an MLP of 4 times the width) {_reach(own)}"
        sentences.append(text + ("." if config.name == DENSE else f"; dense attention {_reach(dense)}."))
    return [Padding(Text(sentence), (0, 0, 0, 2)) for sentence in sentences]


def _reach(start: int | None) -> str:
    return "at no length" if start is None else f"from {_tokens(start)} on"


def _tokens(length: int) -> str:
    return f"{units.count(length)} token{'' if length == 1 else 's'}"


def _picture_note(shown: Shown) -> Text:
    length = next(iter(shown.pictures.values())).length
    note = Text(f"Rows are queries, columns are keys, {length} tokens; filled where a query depends on a key.", QUIET)
    if shown.drawn_with:
        small = ", ".join(f"{option}={value}" for option, value in shown.drawn_with.items())
        note.append(f" Drawn small, with {small}; --set keeps a size as it is.")
    return note
