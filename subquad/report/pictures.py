"""Small inline pictures: who attends whom, and the accuracies of the seeds as dots.

Drawn as SVG from checked numbers and grids; nothing but those and escaped titles reaches the markup.
"""

import re
from collections.abc import Sequence

from subquad.records import units
from subquad.records.mechanisms import Picture
from subquad.report.html import Html, element

DOTS_WIDTH, DOTS_HEIGHT = 120.0, 18.0


def attention_picture(picture: Picture, title: str) -> Html:
    """Return the grid of a mechanism: a row a query, a column a key, filled where the query sees the key."""
    n = picture.length
    runs = [
        f"M{match.start()} {row}h{match.end() - match.start()}v1h-{match.end() - match.start()}z"
        for row, text in enumerate(picture.rows)
        for match in re.finditer("1+", text)
    ]
    return element(
        "svg",
        element("title", title),
        element("rect", width=str(n), height=str(n), class_="unseen"),
        element("path", d="".join(runs), class_="seen"),
        class_="grid",
        viewBox=f"0 0 {n} {n}",
        role="img",
        shape_rendering="crispEdges",
    )


def seed_dots(values: Sequence[float], mean: float, low: float, high: float, color: str) -> Html:
    """Return one dot a seed on the common scale `low`..`high` (accuracies in 0..1), with a tick at the mean."""
    span = max(high - low, 1e-9)
    padding = 6.0

    def x(value: float) -> str:
        return f"{padding + (DOTS_WIDTH - 2 * padding) * (value - low) / span:.1f}"

    middle = f"{DOTS_HEIGHT / 2:.0f}"
    dots = [element("circle", cx=x(value), cy=middle, r="3.6", style=f"fill:{color}") for value in values]
    tick = element("line", x1=x(mean), x2=x(mean), y1="2", y2=f"{DOTS_HEIGHT - 2:.0f}", style=f"stroke:{color}")
    base = element("line", x1="0", x2=f"{DOTS_WIDTH:.0f}", y1=middle, y2=middle, class_="base")
    text = "seeds: " + ", ".join(units.percent(value) for value in values)
    box = f"0 0 {DOTS_WIDTH:.0f} {DOTS_HEIGHT:.0f}"
    return element("svg", element("title", text), base, tick, *dots, class_="dots", viewBox=box, role="img")
