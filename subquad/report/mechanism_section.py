"""The sections about the mechanisms themselves: what was proved of each, who attends whom, formula and paper."""

from subquad.records.mechanisms import Mechanism
from subquad.records.queries import mixer_key
from subquad.records.store import Records
from subquad.report.html import Html, element
from subquad.report.palette import MUTED, Ink
from subquad.report.pictures import attention_picture
from subquad.report.widgets import card, heading_cells, name_cell, swatch, table

UNKNOWN = Ink("ink-guess", *MUTED, "circle")


def capability_section(records: Records, inks: dict[str, Ink]) -> Html:
    """Return the matrix of traits, a row a mechanism by family, with the outcome of its proofs."""
    mechanisms = sorted(records.mechanisms, key=lambda m: (m.family, m.name))
    traits = list(dict.fromkeys(trait for mechanism in mechanisms for trait in mechanism.traits))
    head = heading_cells(["Mechanism", "Family", *[trait.replace("_", " ") for trait in traits], "Probes"])
    rows = [_row(mechanism, traits, _ink(mechanism, records, inks)) for mechanism in mechanisms]
    intro = "What each mechanism can do with its default options. A red probe takes away all figures."
    return card(
        element("h2", "Capabilities"),
        element("p", intro, class_="facts"),
        table(head, rows, class_="matrix"),
        id_="capabilities",
    )


def _ink(mechanism: Mechanism, records: Records, inks: dict[str, Ink]) -> Ink:
    keys = (mixer_key(r.mixer) for r in (*records.runs, *records.profiles) if r.mixer_name == mechanism.name)
    return inks.get(next(keys, ""), UNKNOWN)


def _row(mechanism: Mechanism, traits: list[str], ink: Ink) -> Html:
    marks = [_mark(trait, mechanism.traits.get(trait)) for trait in traits]
    return element("tr", name_cell(ink, mechanism.name), element("td", mechanism.family), *marks, _probes(mechanism))


def _mark(trait: str, value: bool | None) -> Html:
    text, word = {True: ("●", "yes"), False: ("·", "no"), None: ("?", "unknown")}[value]
    return element("td", text, class_=f"mark {word}", title=f"{trait.replace('_', ' ')}: {word}")


def _probes(mechanism: Mechanism) -> Html:
    red, total = mechanism.red_probes, len(mechanism.probes)
    if not total:
        return element("td", element("span", "not run", class_="badge warning"))
    if not red:
        return element("td", element("span", f"{total} of {total} green", class_="badge good"))
    names = "; ".join(f"{probe.name} ({probe.detail})" for probe in red)
    badge = element("span", f"{len(red)} of {total} red", class_="badge bad")
    return element("td", badge, element("span", names, class_="why"))


def gallery_section(records: Records, inks: dict[str, Ink]) -> Html:
    """Return a card a mechanism: picture, what it is, formula, paper."""
    cards = [_card(m, _ink(m, records, inks)) for m in sorted(records.mechanisms, key=lambda m: (m.family, m.name))]
    intro = "Rows are queries, columns are keys; a filled cell is a key that the query sees."
    return card(
        element("h2", "Mechanisms"),
        element("p", intro, class_="facts"),
        element("div", *cards, class_="gallery"),
        id_="mechanisms",
    )


def _card(mechanism: Mechanism, ink: Ink) -> Html:
    pictures = [
        element("div", attention_picture(picture, f"{mechanism.name}, {kind}"), element("span", kind))
        for picture, kind in ((mechanism.picture, "bidirectional"), (mechanism.causal_picture, "causal"))
        if picture is not None
    ]
    grids = element("div", *pictures, class_="grids", style=f"color:{ink.color}")
    if not pictures:
        grids = element("div", "no fixed set of keys", class_="grids none")
    return element(
        "article",
        element("h3", swatch(ink), mechanism.name, element("small", mechanism.family)),
        grids,
        element("p", mechanism.summary),
        element("code", mechanism.formula, class_="formula"),
        element("p", mechanism.paper, class_="paper"),
    )
