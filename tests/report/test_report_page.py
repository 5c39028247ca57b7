import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs
from synthetic_results import ENVIRONMENT, SPECS, mechanism, profile, run

from subquad.records.atomic import OutputError
from subquad.records.mechanisms import Mechanisms
from subquad.records.queries import comparisons
from subquad.records.schema import RunRecord, Status
from subquad.records.store import Records, read_all, write_mechanisms, write_run
from subquad.report.bubbles import bubble_chart
from subquad.report.charts import bubble_figure, loss_curves, score_curves
from subquad.report.html import Html, element, escape, plot_text, script_json
from subquad.report.page import render, write_report
from subquad.report.palette import inks
from subquad.report.scaling import flops_figure, memory_figure, settings, time_figure

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&%{x}$a$"
VOID = {"meta", "input", "img", "br", "hr"}


class Balance(HTMLParser):
    """Fails on an element that is closed without having been opened, and keeps all tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def parsed(page: str) -> Balance:
    balance = Balance()
    balance.feed(page)
    balance.close()
    assert balance.open == []
    return balance


def without_plotly(page: str) -> str:
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


def test_the_page_is_written_where_the_design_says_and_parses(report: Path, results: Path) -> None:
    assert report == results / "report.html"
    parsed(report.read_text())


def test_the_page_names_no_external_address(report: Path) -> None:
    assert (
        re.findall(r"(?i)\b(?:https?|ftp|wss?):|url\(|@import|//[a-z0-9-]+\.", without_plotly(report.read_text())) == []
    )


def test_the_page_forbids_the_network_and_every_foreign_script(report: Path) -> None:
    policies = [value for name, value in parsed(report.read_text()).attributes if name == "content" and value]
    (policy,) = [value for value in policies if "default-src" in value]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("style-src")[0]
    assert "http" not in policy


def test_writing_again_replaces_the_page(results: Path, report: Path) -> None:
    before = report.read_text()
    assert write_report(results).read_text() == before


def test_every_mechanism_keeps_its_row_and_the_red_one_has_no_figures(report: Path) -> None:
    page = without_plotly(report.read_text())
    rows = re.findall(r'<tr id="row-0-.*?</tr>', page)
    assert len(rows) == len(SPECS)
    (red,) = [row for row in rows if "reformer" in row]
    assert "red probe: leak (y[12] saw x[40])" in red
    assert 'data-column="best"' not in red
    assert "%" not in red
    assert "1 of 2 seeds diverged: the training loss was not finite at step 1,000" in page
    assert "majority class" in page


def test_links_to_comparisons_of_one_task_are_told_apart_by_the_preset() -> None:
    record = run(SPECS[0], 0)
    tuned = record.model_copy(update={"preset": "paper"})
    title = escape(record.task.title)
    assert f">{title}</a>" in render(Records(runs=(record,)))
    page = render(Records(runs=(record, tuned)))
    assert f">{title} (quick)</a>" in page
    assert f">{title} (paper)</a>" in page
    assert f">{title}</a>" not in page


def test_only_what_is_long_range_arena_is_called_that(report: Path) -> None:
    assert "<h2>ListOps, short trees</h2>" in report.read_text()
    record = run(SPECS[0], 0)
    official = record.model_copy(update={"preset": "paper", "task": record.task.model_copy(update={"is_lra": True})})
    page = render(Records(runs=(official,)))
    assert re.search(r"<h2>ListOps, short trees <span[^>]*>Long Range Arena</span></h2>", page)


def test_every_command_can_be_copied(report: Path) -> None:
    page = report.read_text()
    for spec in SPECS:
        assert f"--mixers {spec.name} --seeds 1 --output results</code><button" in page


def test_text_becomes_markup_only_when_it_was_made_here() -> None:
    assert element("p", "<b>", Html("<i/>"), title='"') == '<p title="&quot;">&lt;b&gt;<i/></p>'
    assert escape(escape("<")) == "&lt;"
    assert plot_text("<b>&\n") == "&lt;b&gt;&amp; "
    assert script_json("</script>&") == '"\\u003c/script\\u003e\\u0026"'
    with pytest.raises(ValueError, match="<br> is a void element and takes no children, got 1"):
        element("br", "text")


def hostile_records() -> Records:
    changed = {"command": HOSTILE, "mixer": {"name": HOSTILE}}
    environment = ENVIRONMENT.model_copy(update={"cpu": HOSTILE, "commit": HOSTILE, "operating_system": HOSTILE})
    task = run(SPECS[1], 0).task.model_copy(update={"title": HOSTILE})
    failed = {**changed, "mixer": {"name": HOSTILE, "window": HOSTILE}, "message": HOSTILE, "status": Status.FAILED}
    runs = [
        _changed(run(SPECS[1], 0, environment), {**changed, "task": task}),
        _changed(run(SPECS[1], 0, environment), {**failed, "task": task, "metric": None}),
    ]
    profiles = [profile(SPECS[1], environment).model_copy(update=changed)]
    texts = dict.fromkeys(("name", "family", "summary", "paper", "formula"), HOSTILE)
    mechanisms = [mechanism(SPECS[1]).model_copy(update={**texts, "traits": {HOSTILE: True}})]
    return Records(tuple(runs), tuple(profiles), tuple(mechanisms))


def _changed(record: RunRecord, changes: dict[str, object]) -> RunRecord:
    return record.model_copy(update=changes)


def test_hostile_text_never_becomes_markup() -> None:
    page = render(hostile_records())
    balance = parsed(page)
    assert balance.tags.count("script") == 3
    assert "img" not in balance.tags
    assert not [name for name, _ in balance.attributes if name.startswith("on")]
    assert "<script>alert" not in page
    assert HOSTILE not in page


def test_the_figures_are_valid_for_plotly(records: Records) -> None:
    chosen = inks(records)
    (comparison,) = comparisons(records)
    ((_, lines),) = settings(records).items()
    figures = [
        bubble_figure(bubble_chart(comparison), chosen),
        score_curves(comparison, chosen),
        loss_curves(comparison, chosen),
        *[figure(lines, chosen) for figure in (time_figure, memory_figure, flops_figure)],
    ]
    for figure in figures:
        Figure(figure)
        assert figure["layout"]["xaxis"]["title"]["text"]
        assert figure["layout"]["yaxis"]["title"]["text"]


def test_without_a_profile_of_full_its_measurements_beside_the_others_are_the_reference() -> None:
    records = Records(profiles=(profile(SPECS[1]),))
    ((_, lines),) = settings(records).items()
    names = [trace.get("name") for trace in time_figure(lines, inks(records))["data"]]
    assert "full (dense fused)" in names


def test_profiles_alone_and_runs_alone_make_a_page() -> None:
    assert "Scaling with length" in render(Records(profiles=(profile(SPECS[0]),)))
    assert "there is no chart" in render(Records(runs=(run(SPECS[0], 0),)))


def test_several_machines_have_a_filter(records: Records) -> None:
    other = ENVIRONMENT.model_copy(update={"hardware": "other-4-threads"})
    page = render(Records(runs=(*records.runs, run(SPECS[0], 0, other))))
    assert '<option value="other-4-threads">' in page
    assert 'data-hardware="other-4-threads"' in page
    assert "<select" not in render(records)


def test_an_unreadable_file_is_named_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path, run(SPECS[0], 0))
    write_run(tmp_path, run(SPECS[0], 1)).write_text("{")
    page = write_report(tmp_path).read_text()
    assert "1 file left out" in page
    assert "is corrupted or truncated" in page


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no records to report; run `subquad compare` first"):
        write_report(tmp_path)
    write_mechanisms(tmp_path, Mechanisms())
    write_run(tmp_path, run(SPECS[0], 0)).write_text("")
    with pytest.raises(ValueError, match=r"no records to report \(1 files can't be read\)"):
        write_report(tmp_path)


def test_a_page_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, run(SPECS[0], 0))
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*report\.html"):
        write_report(tmp_path)
    assert len(read_all(tmp_path).runs) == 1


def test_the_report_never_loads_torch() -> None:
    code = "import sys, subquad.report.page, subquad.report.still_picture; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
