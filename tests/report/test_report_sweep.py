"""The sweep on the page: the chosen trial of every mechanism, and all trials behind it."""

from __future__ import annotations

import re

from synthetic_results import SPECS, accuracy, run, swept
from test_report_page import HOSTILE, parsed, without_plotly

from subquad.records.store import Records
from subquad.report.page import render

RUNS = tuple(run(spec, 0) for spec in SPECS[:3])


def tables(page: str, kind: str) -> list[list[str]]:
    """The texts of the cells of a table, row by row."""
    (body,) = re.findall(rf'<table class="{kind}">.*?</table>', without_plotly(page))
    rows = re.findall(r"<tr>(.*?)</tr>", body)
    return [[re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def test_the_chosen_trials_stand_with_their_settings_and_scores() -> None:
    page = render(Records(runs=RUNS, sweeps=(swept(),)))
    parsed(page)
    head, full, local, linear = tables(page, "chosen")
    assert head == ["Mechanism", "learning_rate", "window", "Validation accuracy", "Test accuracy", "Trials"]
    assert full == ["full", "0.003", "–", "43.0 %", f"{100 * accuracy(SPECS[0], 0):.1f} ± 1.1 %", "3"]
    assert local == ["local", "0.001", "9", "39.0 %", f"{100 * accuracy(SPECS[1], 0):.1f} ± 1.1 %", "2 of 3 ok"]
    assert linear == ["linear", "no trial ended well", "0 of 3 ok"]
    assert page.count('<td class="marked">0.001</td>') == 1
    assert "lies at the edge of what was tried" in page


def test_every_trial_stands_with_its_outcome() -> None:
    page = render(Records(runs=RUNS, sweeps=(swept(),)))
    _, *trials = tables(page, "trials")
    assert [trial[0] for trial in trials] == ["full"] * 3 + ["local"] * 3 + ["linear"] * 3
    assert [trial[-2] for trial in trials[:6]] == ["40.0 %", "43.0 %", "41.0 %", "39.0 %", "–", "37.0 %"]
    failed = "diverged" * 2 + ": the loss is not finite"
    assert [trial[-1] for trial in trials] == ["ok", "chosen", "ok", "chosen", failed, "ok", *[failed] * 3]


def test_a_sweep_stands_first_and_can_be_repeated() -> None:
    page = without_plotly(render(Records(runs=RUNS, sweeps=(swept(),))))
    assert page.index('id="sweep-0"') < page.index('id="comparison-0"')
    assert '<a href="#sweep-0">Sweep</a>' in page
    assert f"<code>{swept().command}</code><button" in page
    assert "Use local: as good as full." in page
    assert "sweep-0" not in render(Records(runs=RUNS))


def test_hostile_text_of_a_sweep_never_becomes_markup() -> None:
    sweep = swept()
    trial = (
        sweep.mechanisms[2]
        .trials[0]
        .model_copy(
            update={"varied": {HOSTILE: HOSTILE}, "mixer": {"name": HOSTILE}, "status": HOSTILE, "reason": HOSTILE}
        )
    )
    changed = sweep.mechanisms[2].model_copy(update={"mechanism": HOSTILE, "trials": (trial,) * 3})
    texts = {"command": HOSTILE, "preset": HOSTILE, "recommendation": (HOSTILE,), "mechanisms": (changed,)}
    page = render(Records(runs=RUNS, sweeps=(sweep.model_copy(update=texts),)))
    balance = parsed(page)
    assert balance.tags.count("script") == 3
    assert "img" not in balance.tags
    assert HOSTILE not in page
