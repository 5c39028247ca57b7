"""Pictures: who attends whom, in a page and as a figure of its own, and the scores of the seeds as dots.

Drawn as SVG from checked numbers and grids; nothing but those and escaped titles reaches the markup.
"""

from collections.abc import Mapping

from subquad.drawing import Drawing, Layer, Panel, cells_path
from subquad.records.measures import Summary
from subquad.records.mechanisms import Picture
from subquad.records.metrics import MetricKind
from subquad.report.html import Html, element

DOTS_WIDTH, DOTS_HEIGHT = 120.0, 18.0


def attention_picture(picture: Picture, title: str) -> Html:
    """Return the grid of a mechanism: a row a query, a column a key, filled where the query sees the key."""
    n = picture.length
    return element(
        "svg",
        element("title", title),
        element("rect", width=str(n), height=str(n), class_="unseen"),
        element("path", d=cells_path(picture.rows), class_="seen"),
        class_="grid",
        viewBox=f"0 0 {n} {n}",
        role="img",
        shape_rendering="crispEdges",
    )


def mechanism_drawing(name: str, pictures: Mapping[str, Picture], drawn_with: Mapping[str, object]) -> Drawing:
    """Return the picture of a mechanism as a figure of its own, for a file.

    Args:
        name: of the mechanism.
        pictures: form ("bidirectional", "causal") to who attends whom.
        drawn_with: the options that were made small for the pictures.

    Raises:
        ValueError: no pictures.
    """
    if not pictures:
        raise ValueError(f"{name}: it has no form without a context, hence no picture")
    sizes = ", ".join(f"{option}={value}" for option, value in drawn_with.items())
    panels = tuple(Panel(form, (Layer("", picture.rows),)) for form, picture in pictures.items())
    return Drawing(panels, f"{name}, {sizes}" if sizes else name)


def seed_dots(summary: Summary, scale: tuple[float, float], kind: MetricKind, color: str) -> Html:
    """Return one dot a seed on a common scale, worst to best from left to right, with a tick at the mean."""
    worst, best = scale
    span = best - worst or 1.0
    padding = 6.0

    def x(value: float) -> str:
        return f"{padding + (DOTS_WIDTH - 2 * padding) * (value - worst) / span:.1f}"

    middle = f"{DOTS_HEIGHT / 2:.0f}"
    dots = [element("circle", cx=x(value), cy=middle, r="3.6", style=f"fill:{color}") for value in summary.values]
    tick = element(
        "line", x1=x(summary.mean), x2=x(summary.mean), y1="2", y2=f"{DOTS_HEIGHT - 2:.0f}", style=f"stroke:{color}"
    )
    base = element("line", x1="0", x2=f"{DOTS_WIDTH:.0f}", y1=middle, y2=middle, class_="base")
    text = "seeds: " + ", ".join(kind.write(value) for value in summary.values)
    box = f"0 0 {DOTS_WIDTH:.0f} {DOTS_HEIGHT:.0f}"
    return element("svg", element("title", text), base, tick, *dots, class_="dots", viewBox=box, role="img")
