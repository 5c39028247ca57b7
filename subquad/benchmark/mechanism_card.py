"""A mechanism as a card: what it is, from which paper, with which options, what it can do and who attends whom.

Everything is read from where it is written anyway: prose from the docstring of the mechanism's module, options from the
config class and the docstrings below its fields, traits from the config, pictures from the Jacobian. A mechanism of the
user's own that has no such docstring gets what its class docstring says.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Collection, Iterable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from subquad.benchmark.attention_picture import attention_picture
from subquad.benchmark.probe_subject import miniature
from subquad.benchmark.probes import ProbeResult, offered_forms
from subquad.drawing import LONGEST
from subquad.interface import Dims, MixerConfig
from subquad.records.mechanisms import Mechanism, Picture
from subquad.records.schema import ProbeRecord

OWN = "user's own mechanism"
"""Where a mechanism is from that cites no paper."""

_CITATION = re.compile(r"arXiv:\d{4}\.\d{4,5}|\b(19|20)\d\d,? \"")


@dataclass(frozen=True)
class Documentation:
    """The prose about a mechanism; "" where there is none.

    Attributes:
        summary: one sentence, without the mechanism's name.
        paper: the citation, or `OWN`.
        formula: the indented lines, dedented.
        cost: what it costs, as the docstring says it.
        departures: where it departs from the paper.
    """

    summary: str
    paper: str
    formula: str = ""
    cost: str = ""
    departures: str = ""


@dataclass(frozen=True)
class OptionCard:
    """One option of a config class: its type as written, its default (None also where required), its description."""

    name: str
    type: str
    default: Any
    required: bool
    description: str


def mechanism_card(
    config: MixerConfig, results: Iterable[tuple[str, ProbeResult]] = (), *, length: int = 32
) -> Mechanism:
    """The card of a mechanism, as `mechanisms.json` keeps it.

    Args:
        config: the mechanism with its options.
        results: outcomes of the probes, each with the form that was probed: "bidirectional", "causal" or "cross".
        length: tokens in the pictures.
    """
    outcomes = tuple(
        ProbeRecord(name=f"{result.name} ({form})", passed=result.passed, detail=result.detail, seconds=result.seconds)
        for form, result in results
    )
    picture, causal_picture = draw_pictures(config, length=length)
    return card_without_pictures(config, outcomes).model_copy(
        update={"picture": picture, "causal_picture": causal_picture}
    )


def card_without_pictures(config: MixerConfig, outcomes: tuple[ProbeRecord, ...]) -> Mechanism:
    """The card of a mechanism from its prose and traits alone; nothing of it is run.

    Args:
        config: the mechanism with its options.
        outcomes: of its probes.
    """
    documentation = read_documentation(type(config))
    return Mechanism(
        name=config.name,
        family=config.family,
        summary=documentation.summary,
        paper=documentation.paper,
        formula=documentation.formula,
        traits=asdict(config.traits),
        probes=outcomes,
    )


def read_documentation(config_class: type[MixerConfig]) -> Documentation:
    """The docstring of the mechanism's module, taken apart; that of the class where the module's is no such text."""
    module = sys.modules.get(config_class.__module__)
    text = inspect.cleandoc(getattr(module, "__doc__", None) or "")
    paragraphs = re.split(r"\n\s*\n", text)
    prose = [" ".join(paragraph.split()) for paragraph in paragraphs if not paragraph.startswith(" ")]
    paper = next((paragraph for paragraph in prose[1:] if _CITATION.search(paragraph)), "")
    if not paper:
        return Documentation(summary=_own_summary(config_class, prose[0]), paper=OWN)
    formulas = [textwrap.dedent(paragraph).rstrip() for paragraph in paragraphs if paragraph.startswith(" ")]
    return Documentation(
        summary=_sentence(prose[0]),
        paper=paper,
        formula="\n\n".join(formulas),
        cost=next((paragraph for paragraph in prose if paragraph.startswith("Cost")), ""),
        departures=_after("Departures:", prose),
    )


def _own_summary(config_class: type, module_summary: str) -> str:
    written = inspect.cleandoc(config_class.__dict__.get("__doc__") or "")
    if written.startswith(f"{config_class.__name__}("):  # what @dataclass writes for a class without a docstring
        written = ""
    summary = " ".join(written.split("\n\n")[0].split()) or module_summary
    return _sentence(summary) if summary else f"{OWN[0].upper()}{OWN[1:]}."


def _sentence(title: str) -> str:
    """`Local: softmax attention.` becomes `Softmax attention.`."""
    text = re.sub(r"^[^:.]{1,40}: +", "", title)
    return text[:1].upper() + text[1:]


def _after(heading: str, prose: list[str]) -> str:
    found = next((paragraph for paragraph in prose if paragraph.startswith(heading)), "")
    text = found.removeprefix(heading).strip()
    return text[:1].upper() + text[1:]


def describe_options(config_class: type) -> tuple[OptionCard, ...]:
    """The options of a dataclass, in order of declaration, with the docstrings below them in the source.

    Types and descriptions are "" where the source can't be read.
    """
    written = _written_fields(config_class)
    cards = []
    for field in fields(config_class):
        kind, description = written.get(field.name, ("", ""))
        required = field.default is MISSING and field.default_factory is MISSING
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        cards.append(OptionCard(field.name, kind, None if required else default, required, description))
    return tuple(cards)


def _written_fields(config_class: type) -> dict[str, tuple[str, str]]:
    """Annotation and docstring of every annotated name of the class and its bases, as the sources have them."""
    found: dict[str, tuple[str, str]] = {}
    for each in reversed(config_class.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = (ast.unparse(node.annotation), _docstring(after))
    return found


def _docstring(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def picture_config(config: MixerConfig, *, keep: Collection[str] = ()) -> MixerConfig:
    """The config that pictures are drawn with: sizes made small so that their structure fits, except those to keep."""
    small = miniature(config)
    try:
        return replace(small, **{name: getattr(config, name) for name in keep})
    except ValueError:
        return config


def draw_pictures(
    config: MixerConfig, *, length: int, keep: Collection[str] = ()
) -> tuple[Picture | None, Picture | None]:
    """Who attends whom, bidirectional and causal; None for a form that isn't offered.

    Args:
        config: the mechanism.
        length: tokens, 1 to `LONGEST`.
        keep: options whose values stay as they are; other sizes (window, block, rank ...) are made small.

    Raises:
        ValueError: a length out of range.
    """
    if not 1 <= length <= LONGEST:
        raise ValueError(f"a picture of who attends whom has 1 to {LONGEST} tokens, got {length}")
    small = picture_config(config, keep=keep)
    pictures: dict[bool, Picture] = {}
    sizes = Dims(embed_dim=16, num_heads=2, head_dim=8, max_length=length)  # widths don't matter in a picture
    for form in offered_forms(config, sizes):
        if not form.cross and _offers(small, form):
            grid = attention_picture(small, form, length, shrink=False)
            rows = tuple("".join("01"[sees] for sees in row) for row in grid)
            pictures[form.causal] = Picture(length=length, rows=rows)
    return pictures.get(False), pictures.get(True)


def _offers(config: MixerConfig, form: Dims) -> bool:
    """Whether options and form go together: an even window, for one, has no bidirectional form."""
    try:
        config.check(form)
    except ValueError:
        return False
    return True
