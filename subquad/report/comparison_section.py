"""The section of one comparison: recommendation, bubbles, table, learning curves, the commands behind each point."""

from subquad.benchmark.recommendation import recommend
from subquad.records import units
from subquad.records.comparison import Comparison
from subquad.report.bubbles import NARROW, bubble_chart
from subquad.report.charts import bubble_figure, loss_curves, score_curves
from subquad.report.html import Html, element, join
from subquad.report.palette import GUESS_INK, Ink
from subquad.report.pictures import seed_dots
from subquad.report.positions import has_places, position_curves, positions_of
from subquad.report.tables import Row, cells, column_titles, rows_of, stream_note
from subquad.report.widgets import (
    Figures,
    card,
    chips,
    command,
    details,
    name_cell,
    recommendation_box,
    swatch,
    table,
)

SORT_KEYS = {
    "best": lambda row: row.best.mean if row.best else None,
    "last": lambda row: row.last.mean if row.last else None,
    "speed": lambda row: row.relative_speed,
    "step_time": lambda row: row.step_seconds,
    "saved": lambda row: row.saved_bytes,
    "memory": lambda row: row.peak_bytes or row.kept_bytes,
    "parameters": lambda row: row.parameters,
    "steps": lambda row: row.steps,
    "train_time": lambda row: row.train_seconds,
}
FIGURES = ("best", "last", "speed", "step_time", "saved", "memory")
SEEDS_COLUMN = 3
NOTES = (
    "Scores ({direction}): mean over the seeds ± one standard error over the seeds (with a single seed that of the "
    "test split). ◆ marks the Pareto front: no other row is at once as good, as fast and as small. * marks a model "
    "whose parameters are more than 10 % from those of the dense model. Speed, forward + backward and what is kept for "
    "backward are those of one mixer layer from the speed profile at the task's length, never from the training loop. "
    "Training memory is the peak of the whole model; ≥ where only what autograd keeps was measured."
)
CAPTION = (
    "{towards_better} is better, right is faster. Area: bytes kept for backward by one layer (written below the name). "
    "Bars: ± one standard error. Dashed: Pareto front of score and speed; pale bubbles are beaten in score, speed and "
    "memory at once, or had a failed seed. Click a bubble for its row."
)
POSITIONS = "Each point is the mean over a bucket of positions, and over the seeds; buckets double in length."
STREAM_POSITIONS = (
    "Positions count through all windows of a document; what carries no state reads those of its own window alone."
)


def comparison_section(comparison: Comparison, index: int, inks: dict[str, Ink], figures: Figures) -> Html:
    """Return the section, adding its charts to `figures`."""
    kind, rows = comparison.kind, rows_of(comparison)
    answer = recommend(comparison)
    labels = {entry.mixer_key: entry.label for entry in comparison.entries}
    curves = [
        figures.add(
            score_curves(comparison, inks), f"Validation {kind.title}", "One line a seed; later seeds are lighter."
        ),
        figures.add(loss_curves(comparison, inks), "Training loss", "A cross marks where a run diverged or failed."),
    ]
    return card(
        _head(comparison),
        recommendation_box(answer.sentences, found=answer.winner is not None),
        chips(labels, inks),
        _bubbles(comparison, inks, figures),
        element("h3", "Results"),
        _table(comparison, rows, inks, index),
        element("p", f"{NOTES.format(direction=kind.direction)} {stream_note(comparison)}".strip(), class_="note"),
        _positions(comparison, inks, figures),
        element("div", *curves, class_="pair"),
        details("Commands: repeat any point of this comparison", *_commands(rows)),
        id_=f"comparison-{index}",
        class_="card comparison",
        data_hardware=comparison.protocol.hardware,
    )


def _head(comparison: Comparison) -> Html:
    task, protocol = comparison.task, comparison.protocol
    badge = element("span", "Long Range Arena", class_="badge good") if comparison.is_lra else ""
    size = f", width {protocol.width}, depth {protocol.depth}" if protocol.width else ""
    amount = {"steps": units.count, "time": units.seconds}.get(protocol.budget_kind, units.magnitude)
    unit = {"steps": " steps", "parameters": " parameters", "flops": " FLOP", "time": " of training"}
    budget = f"{amount(protocol.budget_amount)}{unit[protocol.budget_kind]}"
    answers = f"{task.num_labels} classes" if task.num_labels else f"{units.count(task.vocab_size)} token ids"
    facts = (
        f"{units.count(task.max_length)} tokens at most, {answers}, {units.count(task.train_size)} / "
        f"{units.count(task.validation_size)} / {units.count(task.test_size)} examples for training / validation / test"
    )
    protocol_text = f"preset {comparison.preset}; equal budget of {budget}{size}; on {protocol.hardware}"
    return element(
        "header",
        element("h2", task.title, *((" ", badge) if badge else ())),
        element("p", f"{task.name}@{task.data_hash}: {facts}", class_="facts"),
        element("p", protocol_text, class_="facts"),
    )


def _bubbles(comparison: Comparison, inks: dict[str, Ink], figures: Figures) -> Html:
    chart = bubble_chart(comparison)
    if not chart.points:
        return element("p", "No entry has both a score and a measured speed, so there is no chart.", class_="note")
    title = f"{chart.kind.title}, speed and memory"
    caption = CAPTION.format(towards_better=chart.kind.towards_better)
    narrow = bubble_figure(bubble_chart(comparison, NARROW), inks, narrow=True)
    heading = title[:1].upper() + title[1:]
    figure = figures.add(bubble_figure(chart, inks), heading, caption, wide=True, narrow=narrow)
    missing = [
        element("li", swatch(inks[entry.mixer_key]), element("b", entry.label), f": {why}")
        for entry, why in chart.missing
    ]
    if not missing:
        return figure
    return join([figure, element("div", "Not in the chart:", element("ul", *missing), class_="note notes")])


def _positions(comparison: Comparison, inks: dict[str, Ink], figures: Figures) -> Html:
    if not has_places(comparison):
        return Html("")
    title = f"Test {comparison.kind.title} by position in the {positions_of(comparison)}"
    note = f"{POSITIONS} {STREAM_POSITIONS}" if comparison.is_stream else POSITIONS
    return figures.add(position_curves(comparison, inks), title, note, wide=True)


def _table(comparison: Comparison, rows: list[Row], inks: dict[str, Ink], index: int) -> Html:
    kind = comparison.kind
    values = sorted((v for row in rows if row.best and row.entry for v in row.best.values), key=kind.goodness)
    scale = (values[0], values[-1]) if values else (0.0, 1.0)
    head = [
        element("th", element("button", title, type="button"), scope="col", data_sort=name)
        for name, title in column_titles(kind).items()
    ]
    head.insert(SEEDS_COLUMN, element("th", "Seeds", scope="col"))
    body = table(head, [_row(row, inks, scale, index) for row in rows], class_="results")
    partial = [element("li", element("b", row.label), f": {row.reason}") for row in rows if _is_partial(row)]
    return join([body, element("ul", *partial, class_="note notes")]) if partial else body


def _is_partial(row: Row) -> bool:
    return row.has_figures and bool(row.reason)


def _row(row: Row, inks: dict[str, Ink], scale: tuple[float, float], index: int) -> Html:
    ink = inks[row.entry.mixer_key] if row.entry else GUESS_INK
    text = cells(row)
    mark = element("span", " ◆", title="on the Pareto front", class_="front") if row.on_pareto_front else ""
    badge = element("span", row.status, class_="badge good" if row.status == "ok" else "badge bad")
    first = [name_cell(ink, text["mechanism"], mark), element("td", badge, data_column="status", data_value=row.status)]
    model = [_cell(row, name, text[name]) for name in ("parameters", "steps", "train_time")]
    attributes = {"id": f"row-{index}-{row.entry.key}"} if row.entry else {}
    if row.best is None:
        reason = element("td", row.reason, colspan=str(len(FIGURES) + 1), class_="why")
        return element("tr", *first, reason, *model, **attributes)
    figures = [_cell(row, name, text[name]) for name in FIGURES]
    dots = seed_dots(row.best, scale, row.comparison.kind, ink.color) if row.entry else "–"
    figures.insert(1, element("td", dots, class_="seeds"))
    return element("tr", *first, *figures, *model, **attributes)


def _cell(row: Row, name: str, text: str) -> Html:
    value = SORT_KEYS[name](row)
    marked = {"class_": "marked"} if name == "parameters" and row.unequal_parameters else {}
    return element("td", text, data_value="" if value is None else repr(value), data_column=name, **marked)


def _commands(rows: list[Row]) -> list[Html]:
    return [
        element("div", element("h4", row.label), *[command(text) for text in dict.fromkeys(row.commands)])
        for row in rows
    ]
