import io
import shutil
from pathlib import Path

import pytest
from command_line import Invoke
from rich.console import Console

from subquad.benchmark.recommendation import recommend
from subquad.cli.results import comparison_table
from subquad.records.queries import comparisons
from subquad.records.store import read_all
from subquad.report.tables import cells, rows_of


def test_the_document_holds_the_rows_and_the_recommendation(results: Path, invoke: Invoke) -> None:
    ran = invoke("report", "--output", str(results), "--json")
    records = read_all(results)
    (comparison,) = ran.document["comparisons"]
    assert [row["mechanism"] for row in comparison["rows"]] == [row.label for row in rows_of(*comparisons(records))]
    recommendation = recommend(*comparisons(records))
    assert comparison["recommendation"]["sentences"] == list(recommendation.sentences)
    assert comparison["recommendation"]["winner"] == "local"
    assert ran.document["page"] == str(results / "report.html")
    assert (results / "report.html").is_file()


def test_the_terminal_shows_the_numbers_of_the_page(results: Path, invoke: Invoke) -> None:
    ran = invoke("report", "--output", str(results))
    text = " ".join(ran.out.split())
    for row in rows_of(*comparisons(read_all(results))):
        shown = cells(row)
        assert f"{shown['mechanism']}" in text
        assert shown["best"] in text
        assert row.reason in text
    recommendation = recommend(*comparisons(read_all(results)))
    assert all(sentence in text for sentence in recommendation.sentences)
    assert ran.out.splitlines()[-1] == f"Report  {results / 'report.html'}"
    assert max(map(len, ran.out.splitlines()[:-1])) <= 100


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_no_cell_is_cut_in_a_narrow_terminal(width: int, results: Path) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    rows = rows_of(*comparisons(read_all(results)))
    console.print(comparison_table(rows, width))
    text = console.export_text()
    assert "…" not in text
    assert all(cells(row)["best"] in text and row.label in text for row in rows)
    assert ("Memory" in text) == (width >= 100)


def test_one_task_can_be_chosen_and_an_unknown_one_is_named(results: Path, invoke: Invoke) -> None:
    assert "ListOps, short trees" in invoke("report", "--task", "listops-quick", "--output", str(results)).out
    ran = invoke("report", "--task", "listops-quick", "--preset", "paper", "--output", str(results))
    assert ran.exit_code == 2
    assert "no such comparison is recorded; there are: listops-quick (quick)." in ran.err


def test_a_folder_with_profiles_alone_says_so(results: Path, tmp_path: Path, invoke: Invoke) -> None:
    profiles = next(results.glob("*/profile"))
    shutil.copytree(profiles, tmp_path / profiles.relative_to(results))
    assert "No training runs yet; 6 speed profiles in the page." in invoke("report", "--output", str(tmp_path)).out


def test_a_file_that_can_not_be_read_is_named(results: Path, tmp_path: Path, invoke: Invoke) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(results, folder)
    broken = next(folder.glob("*/*@*/*/*/seed-1.json"))
    broken.write_text("{")
    ran = invoke("report", "--output", str(folder))
    assert f"Left out: {broken} is corrupted or truncated" in ran.out
    document = invoke("report", "--output", str(folder), "--json").document
    assert [file["path"] for file in document["unreadable"]] == [str(broken)]


def test_without_records_the_report_says_what_to_run(tmp_path: Path, invoke: Invoke) -> None:
    for folder, text in ((tmp_path / "none", "there is no folder"), (tmp_path, "there are no records to report")):
        ran = invoke("report", "--output", str(folder))
        assert ran.exit_code == 2
        assert text in ran.err
        assert "subquad compare" in ran.err


def test_a_picture_of_a_comparison_is_drawn_for_either_page(results: Path, tmp_path: Path, invoke: Invoke) -> None:
    light, dark = tmp_path / "light.svg", tmp_path / "dark.svg"
    assert invoke("report", "--output", str(results), "--picture", str(light)).exit_code == 0
    assert invoke("report", "--output", str(results), "--picture", str(dark), "--dark").exit_code == 0
    assert light.read_text() != dark.read_text()
    assert all("<svg" in path.read_text() for path in (light, dark))


def test_a_picture_that_can_not_be_drawn_is_refused_before_the_page_is_written(
    results: Path, tmp_path: Path, invoke: Invoke
) -> None:
    profiles = next(results.glob("*/profile"))
    folder = tmp_path / "copy"
    shutil.copytree(profiles, folder / profiles.relative_to(results))
    for arguments, text in (
        (["--picture", str(tmp_path / "a.png")], "--picture draws one comparison, and 0 are recorded"),
        (["--dark"], "--dark is of the picture; name its file with --picture"),
    ):
        ran = invoke("report", "--output", str(folder), *arguments)
        assert ran.exit_code == 2
        assert text in " ".join(ran.err.split())
    ran = invoke("report", "--output", str(results), "--picture", str(tmp_path / "missing" / "a.png"))
    assert ran.exit_code == 2
    assert "there is no folder" in ran.err
    assert not (folder / "report.html").exists()
