"""The section of a sweep: the trial that validation chose for each mechanism, and all trials behind it."""

import json
from collections.abc import Sequence

from pydantic import JsonValue

from subquad.records import units
from subquad.records.metrics import MetricKind
from subquad.records.queries import mixer_key
from subquad.records.sweeps import SweepRecord, TrialRecord, TunedRecord
from subquad.report.html import Html, element
from subquad.report.palette import GUESS_INK, Ink
from subquad.report.widgets import card, command, details, heading_cells, name_cell, recommendation_box, table

NOTE = (
    "Every mechanism had equally many trials. Chosen is the one with the best validation {metric} ({direction}), the "
    "mean over its seeds; its test {metric}, ± standard error, was looked up afterwards and chose nothing. A trial "
    "counts where every seed ended well."
)
EDGE = " In colour: the chosen value lies at the edge of what was tried, so a wider grid may find a better one."


def sweep_section(sweep: SweepRecord, index: int, inks: dict[str, Ink]) -> Html:
    """Return the section."""
    kind, names = sweep.task.kind, _varied(sweep)
    note = NOTE.format(metric=kind.title, direction=kind.direction)
    if any(tuned.at_edge for tuned in sweep.mechanisms):
        note += EDGE
    return card(
        _head(sweep),
        recommendation_box(sweep.recommendation, found=sweep.winner is not None),
        element("h3", "Chosen trials"),
        _chosen_table(sweep.mechanisms, names, kind, inks),
        element("p", note, class_="note"),
        details("All trials", _trial_table(sweep.mechanisms, names, kind, inks)),
        details("Command: repeat this sweep", command(sweep.command)),
        id_=f"sweep-{index}",
        class_="card sweep",
        data_hardware=sweep.hardware,
    )


def _head(sweep: SweepRecord) -> Html:
    tried = len(sweep.mechanisms[0].trials)
    trials = f"{units.count(tried)} trial{'' if tried == 1 else 's'} of each mechanism"
    seeds = f"{len(sweep.seeds)} seed{'' if len(sweep.seeds) == 1 else 's'}"
    facts = f"{sweep.task.name}@{sweep.task.data_hash}; preset {sweep.preset}; {trials}, {seeds}; on {sweep.hardware}"
    return element("header", element("h2", f"Sweep: {sweep.task.title}"), element("p", facts, class_="facts"))


def _varied(sweep: SweepRecord) -> list[str]:
    """Names of what is varied for any mechanism, in order of appearance."""
    trials = [trial for tuned in sweep.mechanisms for trial in tuned.trials]
    return list(dict.fromkeys(name for trial in trials for name in trial.varied))


def _chosen_table(
    mechanisms: Sequence[TunedRecord], names: Sequence[str], kind: MetricKind, inks: dict[str, Ink]
) -> Html:
    head = heading_cells(["Mechanism", *names, f"Validation {kind.title}", f"Test {kind.title}", "Trials"])
    return table(head, [_chosen_row(tuned, names, kind, inks) for tuned in mechanisms], class_="chosen")


def _chosen_row(tuned: TunedRecord, names: Sequence[str], kind: MetricKind, inks: dict[str, Ink]) -> Html:
    ended = sum(trial.validation is not None for trial in tuned.trials)
    count = str(ended) if ended == len(tuned.trials) else f"{ended} of {len(tuned.trials)} ok"
    if tuned.chosen is None or tuned.test is None:
        why = element("td", "no trial ended well", colspan=str(len(names) + 2), class_="why")
        return element("tr", _name(tuned.trials[0], tuned.mechanism, inks), why, element("td", count))
    trial = tuned.trials[tuned.chosen]
    test = kind.cell(tuned.test, tuned.test_standard_error)
    scores = [element("td", _score(trial, kind)), element("td", test, data_column="best"), element("td", count)]
    return element("tr", _name(trial, tuned.mechanism, inks), *_point(trial, names, marked=tuned.at_edge), *scores)


def _trial_table(
    mechanisms: Sequence[TunedRecord], names: Sequence[str], kind: MetricKind, inks: dict[str, Ink]
) -> Html:
    rows = [
        element(
            "tr",
            _name(trial, tuned.mechanism, inks),
            *_point(trial, names),
            element("td", _score(trial, kind)),
            _outcome(trial, chosen=index == tuned.chosen),
        )
        for tuned in mechanisms
        for index, trial in enumerate(tuned.trials)
    ]
    return table(heading_cells(["Mechanism", *names, f"Validation {kind.title}", "Outcome"]), rows, class_="trials")


def _name(trial: TrialRecord, mechanism: str, inks: dict[str, Ink]) -> Html:
    return name_cell(inks.get(mixer_key(trial.mixer), GUESS_INK), mechanism)


def _point(trial: TrialRecord, names: Sequence[str], marked: Sequence[str] = ()) -> list[Html]:
    return [
        element("td", _value(trial.varied[name]) if name in trial.varied else "–", **_mark(name in marked))
        for name in names
    ]


def _mark(marked: bool) -> dict[str, str]:
    return {"class_": "marked"} if marked else {}


def _value(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _score(trial: TrialRecord, kind: MetricKind) -> str:
    return "–" if trial.validation is None else kind.cell(trial.validation)


def _outcome(trial: TrialRecord, *, chosen: bool) -> Html:
    if chosen:
        return element("td", element("span", "chosen", class_="badge good"))
    if trial.validation is not None:
        return element("td", trial.status)
    return element("td", element("span", trial.status, class_="badge bad"), element("span", trial.reason, class_="why"))
