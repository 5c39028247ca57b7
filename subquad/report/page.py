"""The report: everything in an output folder as one self-contained HTML page.

The page opens from disk and needs no network, which its Content-Security-Policy also forbids; scripts run only if their
hash is the one written in that policy, so text from a record could not run even if it became markup. It reads the
records and `mechanisms.json`, never the code of a mechanism.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from plotly.offline import get_plotlyjs

from subquad.records import units
from subquad.records.atomic import write_atomically
from subquad.records.comparison import Comparison
from subquad.records.queries import comparisons, mixer_labels
from subquad.records.schema import Environment
from subquad.records.store import Records, read_all
from subquad.report.comparison_section import comparison_section
from subquad.report.html import Html, element, escape, join, script_json
from subquad.report.mechanism_section import capability_section, gallery_section
from subquad.report.palette import css, inks
from subquad.report.receipts_section import receipts_section
from subquad.report.scaling import settings
from subquad.report.scaling_section import scaling_section
from subquad.report.sweep_section import sweep_section
from subquad.report.widgets import Figures, card, heading_cells, table

REPORT_FILE = "report.html"
MOST_TASKS_IN_TITLE = 2


def write_report(output: Path) -> Path:
    """Write `<output>/report.html` from the records in `output` and return its path.

    Raises:
        ValueError: there is no such folder, or no readable record in it.
        OutputError: the page can't be written.
    """
    path = output / REPORT_FILE
    write_atomically(path, render(read_all(output)))
    return path


def render(records: Records) -> str:
    """Return the page for `records`.

    Raises:
        ValueError: there is neither a run nor a profile.
    """
    if not records.runs and not records.profiles:
        unreadable = f" ({len(records.unreadable)} files can't be read)" if records.unreadable else ""
        raise ValueError(f"there are no records to report{unreadable}; run `subquad compare` first.")
    chosen, figures = inks(records), Figures()
    found = comparisons(records)
    sections = [sweep_section(sweep, i, chosen) for i, sweep in enumerate(records.sweeps)]
    sections += [comparison_section(comparison, i, chosen, figures) for i, comparison in enumerate(found)]
    profiled = settings(records).items()
    sections += [scaling_section(setting, lines, i, chosen, figures) for i, (setting, lines) in enumerate(profiled)]
    if records.mechanisms:
        sections += [capability_section(records, chosen), gallery_section(records, chosen)]
    sections += [receipts_section(records, chosen), _environments(records), *_unreadable(records)]
    body = join([_top(records, found, len(profiled)), element("main", *sections)])
    return _document(body, figures, css(chosen))


def _document(body: Html, figures: Figures, variables: str) -> str:
    plotly, script = get_plotlyjs(), _asset("page.js")
    policy = (
        f"default-src 'none'; script-src {_source_hash(plotly)} {_source_hash(script)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<title>subquad report</title>\n'
        f"<style>{variables}{_asset('page.css')}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="figures">{script_json(figures.by_id)}</script>\n'
        f"<script>{plotly}</script>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("subquad.report").joinpath(name).read_text(encoding="utf-8")


def _source_hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _top(records: Records, found: Sequence[Comparison], profiled: int) -> Html:
    machines = list(dict.fromkeys(record.environment.hardware for record in (*records.runs, *records.profiles)))
    dates = sorted(record.created[:10] for record in (*records.runs, *records.profiles))
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    mechanisms = {entry.mixer_key for comparison in found for entry in comparison.entries} or mixer_labels(records)
    tasks = list(dict.fromkeys(comparison.task.title for comparison in found))
    named = ", ".join(tasks) if len(tasks) <= MOST_TASKS_IN_TITLE else f"{len(tasks)} tasks"
    what = f"{_number(len(mechanisms), 'mechanism')} on {named}" if tasks else "Speed and memory"
    links = [(f"#sweep-{i}", "Sweep") for i in range(len(records.sweeps))]
    links += [(f"#comparison-{i}", text) for i, text in enumerate(_link_texts(found))]
    links += [(f"#scaling-{i}", "Scaling") for i in range(profiled)]
    if records.mechanisms:
        links += [("#capabilities", "Capabilities"), ("#mechanisms", "Mechanisms")]
    links += [("#receipts", "Receipts"), ("#machines", "Machines")]
    navigation = element("nav", *[element("a", text, href=target) for target, text in links])
    toggle = element("button", "Light / dark", type="button", id="theme", title="Switch between light and dark")
    return element(
        "header",
        element("p", "subquad report", class_="kicker"),
        element("h1", what),
        element("p", f"Measured on {', '.join(machines)}, {when}. {_counted(records)}.", class_="facts"),
        element("div", navigation, _filter(machines), toggle, class_="bar"),
        class_="top",
    )


def _link_texts(found: Sequence[Comparison]) -> list[str]:
    """The title of each comparison's task, with the preset where several have the title."""
    titles = Counter(comparison.task.title for comparison in found)
    return [f"{c.task.title} ({c.preset})" if titles[c.task.title] > 1 else c.task.title for c in found]


def _counted(records: Records) -> str:
    return f"{_number(len(records.runs), 'training run')}, {_number(len(records.profiles), 'speed profile')}"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _filter(machines: Sequence[str]) -> str:
    if len(machines) < 2:
        return ""
    options = [element("option", machine, value=machine) for machine in machines]
    every = element("option", "all machines", value="")
    return element("label", "Hardware ", element("select", every, *options, id="hardware"))


def _environments(records: Records) -> Html:
    distinct = list(dict.fromkeys(record.environment for record in (*records.runs, *records.profiles)))
    titles = ["Machine", "CPU", "Accelerator", "Threads", "Memory", "System", "Python", "torch", "transformers"]
    rows = []
    for hardware, *rest in map(_environment, distinct):
        rows.append(element("tr", element("th", hardware, scope="row"), *[element("td", text) for text in rest]))
    body = table(heading_cells([*titles, "subquad", "Commit"]), rows, class_="text")
    return card(element("h2", "Machines and software"), body, id_="machines")


def _environment(e: Environment) -> tuple[str, ...]:
    machine = (e.hardware, e.cpu, e.accelerator or "none", str(e.threads), units.size(e.memory_bytes))
    return (*machine, e.operating_system, e.python, e.torch, e.transformers, e.subquad, e.commit or "–")


def _unreadable(records: Records) -> list[Html]:
    if not records.unreadable:
        return []
    items = [element("li", file.reason) for file in records.unreadable]
    title = element("h2", f"{_number(len(items), 'file')} left out")
    return [card(title, element("ul", *items), id_="unreadable", class_="card problem")]
