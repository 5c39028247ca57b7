"""A table is of one preset with its changed settings, and validation scores are there to choose by."""

from collections.abc import Callable

import pytest

from subquad.records.comparison import preset_of
from subquad.records.queries import comparisons, guess_of
from subquad.records.schema import RunRecord
from subquad.records.store import Records

MakeRun = Callable[..., RunRecord]

CHANGED = {"learning_rate": 1e-4, "schedule": "cosine", "stream": True}


def test_a_preset_is_written_with_its_changed_settings(make_run: MakeRun) -> None:
    assert preset_of(make_run(preset="quick")) == "quick"
    changed = make_run(preset="my-own-0123abcdef", changed_settings=CHANGED)
    assert preset_of(changed) == "my-own:learning_rate=0.0001:schedule=cosine:stream=true"


def test_runs_under_changed_settings_have_a_table_of_their_own(make_run: MakeRun) -> None:
    changed = make_run("local", preset="quick-0123abcdef", changed_settings=CHANGED)
    found = comparisons(Records(runs=(make_run("full"), make_run("local"), changed)))
    assert [(c.preset, [entry.name for entry in c.entries]) for c in found] == [
        ("quick", ["full", "local"]),
        (preset_of(changed), ["local"]),
    ]


def test_the_quick_preset_with_changed_settings_is_no_long_range_arena_either(make_run: MakeRun) -> None:
    task = make_run().task.model_dump() | {"is_lra": True}
    runs = (
        make_run(task=task, preset="quick-0123abcdef", changed_settings=CHANGED),
        make_run(task=task, preset="base-0123abcdef", changed_settings=CHANGED),
    )
    assert {c.preset.partition(":")[0]: c.is_lra for c in comparisons(Records(runs=runs))} == {
        "quick": False,
        "base": True,
    }


def test_the_validation_score_is_the_mean_over_the_seeds_where_all_ended_well(make_run: MakeRun) -> None:
    runs = (make_run("local", 0, 0.4), make_run("local", 1, 0.6))
    ((entry,),) = (c.entries for c in comparisons(Records(runs=runs)))
    assert entry.validation == pytest.approx(0.5)
    diverged = make_run("local", 2, status="diverged", message="loss not finite", metric=None)
    ((entry,),) = (c.entries for c in comparisons(Records(runs=(*runs, diverged))))
    assert entry.validation is None


def test_the_guess_is_that_of_the_same_data(make_run: MakeRun) -> None:
    guess = make_run("majority_class", 0, 0.3, model={}, parameters=0, placement="none")
    records = Records(runs=(make_run(), guess))
    assert guess_of(guess.task, records) == guess
    assert guess_of(guess.task.model_copy(update={"data_hash": "other"}), records) is None
