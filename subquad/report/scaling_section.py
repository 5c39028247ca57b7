"""The section of one profile setting: time, memory and cost against length, and the lengths where dense is beaten."""

from subquad.records import units
from subquad.records.conventions import DENSE
from subquad.records.schema import ProfilePoint
from subquad.report.html import Html, element
from subquad.report.palette import Ink
from subquad.report.scaling import Line, Setting, drawn, flops_figure, memory_figure, time_figure
from subquad.report.widgets import Figures, card, chips, command, details, heading_cells, name_cell, table


def scaling_section(
    setting: Setting, lines: tuple[Line, ...], index: int, inks: dict[str, Ink], figures: Figures
) -> Html:
    """Return the section, adding its charts to `figures`."""
    charts = [
        figures.add(
            time_figure(lines, inks),
            "Time of one layer",
            "Median of forward + backward; band: interquartile range; ×: from here on faster than dense attention.",
            wide=True,
        ),
        figures.add(
            memory_figure(lines, inks), "Memory of one layer", "Kept for backward; dotted, where measured: peak."
        ),
        figures.add(
            flops_figure(lines, inks), "Analytic cost", "Multiply-adds × 2 of the visible pairs, one sequence."
        ),
    ]
    commands = [element("div", element("h4", line.label), command(line.profile.command)) for line in lines]
    return card(
        element("h2", "Scaling with length"),
        element("p", f"{setting.text}; on {setting.hardware}", class_="facts"),
        chips({line.key: line.label for line in lines}, inks),
        element("div", *charts, class_="pair"),
        element("h3", "Crossover against dense fused attention"),
        _table(lines, inks),
        element(
            "p",
            "In each cell: median forward + backward, and in brackets how many times faster than dense fused attention "
            "measured alternately with it. A crossover is the shortest length from which the mechanism stays faster, "
            "interpolated between the measured lengths.",
            class_="note",
        ),
        details("Commands: repeat any of these measurements", *commands),
        id_=f"scaling-{index}",
        class_="card scaling",
        data_hardware=setting.hardware,
    )


def _table(lines: tuple[Line, ...], inks: dict[str, Ink]) -> Html:
    lengths = sorted({point.length for line in drawn(lines) for point in line.profile.points})
    columns = [f"{units.count(length)} tokens" for length in lengths]
    titles = ["Mechanism", "Faster from", *columns, "Kept at the longest (of dense)"]
    return table(heading_cells(titles), [_row(line, lengths, inks) for line in lines], class_="profile")


def _row(line: Line, lengths: list[int], inks: dict[str, Ink]) -> Html:
    name = name_cell(inks[line.key], line.label)
    if line.refused or not line.profile.points:
        why = element("span", line.refused, class_="why")
        return element("tr", name, element("td", element("span", "no figures", class_="badge bad"), why, colspan="99"))
    by_length = {point.length: point for point in line.profile.points}
    last = line.profile.points[-1]
    memory = f"{units.size(last.saved_bytes)} ({units.percent(last.saved_bytes / max(last.dense_saved_bytes, 1), 0)})"
    times = [element("td", _time(by_length.get(length))) for length in lengths]
    return element("tr", name, element("td", _crossover(line), data_column="crossover"), *times, element("td", memory))


def _time(point: ProfilePoint | None) -> str:
    if point is None:
        return "–"
    median, dense = point.forward_backward.median_seconds, point.dense_forward_backward.median_seconds
    return f"{units.seconds(median)} ({units.times(dense / median)})"


def _crossover(line: Line) -> str:
    if line.profile.mixer_name == DENSE:
        return "reference"
    length = line.profile.crossover_length
    if length is None:
        return f"not up to {units.count(line.profile.points[-1].length)}"
    if length <= line.profile.points[0].length:
        return f"{units.count(length)} or fewer tokens"
    return f"about {units.count(float(f'{length:.2g}'))} tokens"
