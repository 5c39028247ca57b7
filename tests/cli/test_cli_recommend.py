import shutil
from pathlib import Path

from command_line import Invoke

from subquad.benchmark.recommendation import recommend
from subquad.records.queries import comparisons
from subquad.records.store import read_all


def test_the_recommendation_is_that_of_the_report(results: Path, invoke: Invoke) -> None:
    expected = recommend(*comparisons(read_all(results)))
    ran = invoke("recommend", "--output", str(results))
    text = " ".join(ran.out.split())
    assert "ListOps, short trees" in text
    assert all(sentence in text for sentence in expected.sentences)
    (found,) = invoke("recommend", "--output", str(results), "--json").document["recommendations"]
    assert found["recommendation"]["sentences"] == list(expected.sentences)
    assert found["metric"] == {"name": "accuracy", "higher_is_better": True}


def test_without_a_run_there_is_nothing_to_recommend(results: Path, tmp_path: Path, invoke: Invoke) -> None:
    profiles = next(results.glob("*/profile"))
    shutil.copytree(profiles, tmp_path / profiles.relative_to(results))
    ran = invoke("recommend", "--output", str(tmp_path))
    assert ran.exit_code == 2
    assert "no training run is recorded, so there is nothing to recommend; run `subquad compare` first" in ran.err


def test_one_task_or_preset_can_be_chosen_and_an_unknown_one_is_named(results: Path, invoke: Invoke) -> None:
    options = ["--task", "listops-quick", "--preset", "quick", "--output", str(results)]
    assert invoke("recommend", *options).exit_code == 0
    ran = invoke("recommend", "--task", "text", "--output", str(results))
    assert ran.exit_code == 2
    assert "no such comparison is recorded; there are: listops-quick (quick)." in ran.err
