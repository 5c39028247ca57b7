"""Pieces that several sections of the page share: cards, figures, tables, chips, copyable commands."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from subquad.report.charts import Figure
from subquad.report.html import Html, element
from subquad.report.palette import Ink


@dataclass
class Figures:
    """The figures of the page under construction, by the id of the element that each is drawn in."""

    by_id: dict[str, Figure] = field(default_factory=dict)

    def add(
        self, figure: Figure, title: str, caption: str, *, wide: bool = False, narrow: Figure | None = None
    ) -> Html:
        """Keep `figure`, and what is drawn of it on a `narrow` screen; return its element, with heading and caption."""
        name = f"figure-{len(self.by_id)}"
        self.by_id[name] = figure if narrow is None else {**figure, "narrow": narrow}
        height = f"height:{figure['layout']['height']}px"
        plot = element("div", element("div", id=name, class_="plot", style=height), class_="plot-scroll")
        heading = element("h3", title)
        return element(
            "figure", heading, plot, element("figcaption", caption), class_="figure wide" if wide else "figure"
        )


def card(*children: str, id_: str = "", class_: str = "card", **data: str) -> Html:
    """Return a section of the page."""
    named = {"id": id_} if id_ else {}
    return element("section", *children, class_=class_, **named, **data)


def swatch(ink: Ink) -> Html:
    """Return the colour of a mechanism as a small square."""
    return element("span", class_="swatch", style=f"background:{ink.color}")


def name_cell(ink: Ink, label: str, mark: str = "") -> Html:
    """Return the head cell of a mechanism's row."""
    return element("th", element("span", swatch(ink), element("span", label, mark), class_="name"), scope="row")


def recommendation_box(sentences: Sequence[str], *, found: bool) -> Html:
    """Return a recommendation, its first sentence large; where nothing was `found` to use, as a warning."""
    lead, *rest = sentences
    body = [element("p", lead, class_="lead"), *[element("p", sentence, class_="reason") for sentence in rest]]
    kind = "recommendation" if found else "recommendation none"
    return element("div", element("p", "Recommendation", class_="kicker"), *body, class_=kind)


def chips(labels: Mapping[str, str], inks: Mapping[str, Ink]) -> Html:
    """Return one button a mechanism (key to label) that hides or shows it in every chart."""
    buttons = [
        element("button", swatch(inks[key]), label, type="button", class_="chip", data_mixer=key, aria_pressed="true")
        for key, label in labels.items()
    ]
    return element("div", *buttons, class_="chips", role="group", aria_label="Show or hide a mechanism in the charts")


def command(text: str) -> Html:
    """Return a command with a button that copies it."""
    button = element("button", "Copy", type="button", class_="copy")
    return element("div", element("code", text), button, class_="command")


def table(head: Sequence[str], rows: Iterable[str], *, class_: str = "") -> Html:
    """Return a table that scrolls inside its own box; `head` holds the cells of the head, `rows` finished rows."""
    header = element("thead", element("tr", *head))
    body = element("table", header, element("tbody", *rows), class_=class_)
    return element("div", body, class_="scroll", tabindex="0")


def heading_cells(titles: Iterable[str]) -> list[Html]:
    """Return plain head cells."""
    return [element("th", title, scope="col") for title in titles]


def details(summary: str, *children: str) -> Html:
    """Return content that opens on a click."""
    return element("details", element("summary", summary), *children)
