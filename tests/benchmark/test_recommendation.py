import json
import math
from typing import Any

import pytest

from subquad.benchmark.recommendation import Recommendation, Verdict, recommend
from subquad.records.queries import comparisons
from subquad.records.schema import ProfileRecord, RunRecord
from subquad.records.store import Records

ENVIRONMENT: dict[str, Any] = {
    "hardware": "test-cpu-2-threads",
    "cpu": "Test CPU",
    "accelerator": None,
    "threads": 2,
    "memory_bytes": 8_000_000_000,
    "operating_system": "Linux",
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "subquad": "0.1.0",
    "commit": None,
}
TASK: dict[str, Any] = {
    "name": "copying",
    "title": "Copying",
    "is_lra": False,
    "objective": "classification",
    "metric": "accuracy",
    "data_hash": "abc123",
    "train_size": 100,
    "validation_size": 50,
    "test_size": 10_000,
    "vocab_size": 10,
    "num_labels": 2,
    "max_length": 1000,
}
COST = {"flops": 10, "activation_bytes": 20, "state_bytes": 0, "parameters": 30}


def runs(name: str, *accuracies: float, **changes: Any) -> list[RunRecord]:
    """One run a seed; 10,000 test examples make the binomial error of 0.5 half a point."""
    records = []
    for seed, accuracy in enumerate(accuracies):
        error = math.sqrt(accuracy * (1 - accuracy) / 10_000)
        score = {"step": 10, "validation": accuracy, "test": accuracy, "test_standard_error": error}
        metric = {"name": "accuracy", "higher_is_better": True, "examples": 10_000, "asked": 10_000}
        document = {
            "created": "2026-11-22T04:30:00+00:00",
            "command": "subquad compare",
            "mixer": {"name": name},
            "environment": ENVIRONMENT,
            "status": "ok",
            "task": TASK,
            "placement": "sublayer",
            "model": {"hidden_size": 64},
            "parameters": 1000,
            "parameters_of_dense": 1000,
            "preset": "quick",
            "steps": 10,
            "budget": {"kind": "steps", "amount": 10},
            "seed": seed,
            "metric": {**metric, "best_validation": score, "last_step": score},
            "train_seconds": 3.0,
            **changes,
        }
        records.append(RunRecord.model_validate_json(json.dumps(document)))
    return records


def profile(name: str, milliseconds: float, *, kilobytes: int = 100, slope: float = 1) -> ProfileRecord:
    """Times at 500, 1000 and 4000 tokens: the mechanism's grows with length ** slope, that of dense with its square."""
    points = []
    for length in (500, 1000, 4000):
        mine = {"samples_seconds": [milliseconds / 1000 * (length / 1000) ** slope]}
        other = {"samples_seconds": [10 / 1000 * (length / 1000) ** 2]}
        points.append(
            {
                "length": length,
                "forward": mine,
                "forward_backward": mine,
                "dense_forward": other,
                "dense_forward_backward": other,
                "saved_bytes": kilobytes * length,
                "dense_saved_bytes": 100 * length,
                "peak_bytes": None,
                "dense_peak_bytes": None,
                "cost": COST,
                "dense_cost": COST,
            }
        )
    document = {
        "created": "2026-11-22T04:30:00+00:00",
        "command": "subquad profile",
        "mixer": {"name": name},
        "environment": ENVIRONMENT,
        "status": "ok",
        "embed_dim": 64,
        "num_heads": 4,
        "batch_size": 1,
        "dtype": "float32",
        "causal": False,
        "points": points,
    }
    return ProfileRecord.model_validate_json(json.dumps(document))


def bits_runs(name: str, *values: float, **changes: Any) -> list[RunRecord]:
    """One run a seed on a task that is measured in bits per byte, each with a standard error of 0.01."""
    task = TASK | {"objective": "causal_lm", "metric": "bits_per_byte", "num_labels": None}
    metric = {"name": "bits_per_byte", "higher_is_better": False, "examples": 100, "asked": 10_000}
    records = []
    for seed, value in enumerate(values):
        score = {"step": 10, "validation": value, "test": value, "test_standard_error": 0.01}
        of_seed = {"task": task, "metric": {**metric, "best_validation": score, "last_step": score}, "seed": seed}
        records += runs(name, 0.5, **{**of_seed, **changes})
    return records


UNIGRAM = bits_runs("unigram", 4.8, parameters=0, model={}, placement="none")
FULL_PROFILE = profile("full", 10, slope=2)
MAJORITY = runs("majority_class", 0.1, parameters=0, model={}, placement="none")


def answer(records: list[RunRecord], *profiles: ProfileRecord) -> Recommendation:
    return recommend(*comparisons(Records(runs=tuple(records), profiles=(FULL_PROFILE, *profiles))))


def test_the_fastest_of_the_equally_good_is_recommended() -> None:
    records = [*MAJORITY, *runs("full", 0.50, 0.51), *runs("local", 0.50, 0.505), *runs("linear", 0.505, 0.50)]
    found = answer(records, profile("local", 5), profile("linear", 4))
    assert found.verdict is Verdict.USE
    assert found.winner is not None
    assert found.winner.name == "linear"
    assert [entry.name for entry in found.equals] == ["local", "full"]
    assert found.sentences == (
        "Use linear: 50.2 ± 0.5 % test accuracy, as good as local (50.2 ± 0.5 %) and full (50.5 ± 0.5 %) within two "
        "standard errors.",
        "At 1,000 tokens its forward + backward takes 4.00 ms, 2.50× the speed of dense fused attention (10.0 ms); for "
        "backward it keeps 100 kB (dense 100 kB).",
    )


def test_a_faster_one_that_is_worse_by_more_than_two_errors_is_not_recommended() -> None:
    records = [*MAJORITY, *runs("local", 0.50, 0.50), *runs("linear", 0.48, 0.48)]
    found = answer(records, profile("local", 5), profile("linear", 1))
    assert found.winner is not None
    assert found.winner.name == "local"
    assert found.equals == ()
    assert "2.0 points better than the next, linear (48.0 ± 0.5 %)" in found.sentences[0]


def test_equal_speed_is_decided_by_memory() -> None:
    records = [*MAJORITY, *runs("local", 0.50), *runs("linear", 0.50)]
    found = answer(records, profile("local", 5.05, kilobytes=50), profile("linear", 5, kilobytes=80))
    assert found.winner is not None
    assert found.winner.name == "local"


def test_seeds_that_agree_by_chance_do_not_make_a_tie_a_win() -> None:
    records = [*MAJORITY, *runs("full", 0.502, 0.502), *runs("local", 0.50, 0.50)]
    found = answer(records, profile("local", 5))
    assert found.winner is not None
    assert found.winner.name == "local"


@pytest.mark.parametrize(
    "broken",
    [
        runs("linear", 0.9, 0.9, probes=[{"name": "leak", "passed": False, "detail": "y[1]", "seconds": 0}]),
        [*runs("linear", 0.9), *runs("linear", 0.9, seed=1, status="failed", message="no", metric=None)],
    ],
    ids=["red probe", "failed seed"],
)
def test_a_red_or_failed_mechanism_is_never_recommended(broken: list[RunRecord]) -> None:
    found = answer([*MAJORITY, *runs("local", 0.5, 0.5), *broken], profile("local", 5), profile("linear", 1))
    assert found.winner is not None
    assert found.winner.name == "local"


def test_a_more_accurate_but_broken_rival_is_named_with_its_reason() -> None:
    broken = [*runs("linear", 0.9), *runs("linear", 0.9, seed=1, status="failed", message="no", metric=None)]
    found = answer([*MAJORITY, *runs("local", 0.5, 0.5), *broken], profile("local", 5))
    assert found.sentences[0].endswith("linear (90.0 ± 0.3 %) can't be recommended: 1 of 2 seeds failed: no.")


def test_nothing_better_than_the_guess_means_train_longer() -> None:
    found = answer([*MAJORITY, *runs("full", 0.104), *runs("local", 0.102)], profile("local", 5))
    assert found.verdict is Verdict.TRAIN_LONGER
    assert found.winner is None
    assert found.sentences == (
        "No mechanism has learned the task: train longer. The best, full, reaches 10.4 ± 0.3 % test accuracy, "
        "which two standard errors don't separate from the majority class guess of 10.0 %.",
    )


def test_nothing_finished_is_an_answer() -> None:
    found = answer([*MAJORITY, *runs("full", 0.1, status="out of memory", message="8 GB", metric=None)])
    assert found.verdict is Verdict.NOTHING_FINISHED
    assert found.sentences == ("No mechanism can be recommended: none finished all its runs with green probes.",)


def test_dense_attention_may_win_and_the_runner_up_is_named_with_its_crossover() -> None:
    records = [*MAJORITY, *runs("full", 0.50, 0.51), *runs("local", 0.50, 0.50)]
    found = answer(records, profile("local", 20))
    assert found.verdict is Verdict.KEEP_DENSE
    assert found.sentences == (
        "Keep dense attention (full): 50.5 ± 0.5 % test accuracy, as good as local (50.0 ± 0.5 %) within two standard "
        "errors.",
        "At 1,000 tokens the runner-up, local, takes 20.0 ms for forward + backward against 10.0 ms; it would pay from "
        "about 2,000 tokens on.",
    )


def test_dense_attention_may_win_by_accuracy() -> None:
    found = answer([*MAJORITY, *runs("full", 0.6, 0.6), *runs("local", 0.5, 0.5)], profile("local", 5))
    assert found.verdict is Verdict.KEEP_DENSE
    assert "10.0 points better than the next, local" in found.sentences[0]
    assert found.sentences[1] == (
        "The runner-up, local, is worse by 10.0 points; by time, it is faster than dense attention from the "
        "shortest measured length, 500 tokens, on."
    )


def test_dense_attention_alone_says_that_nothing_else_finished() -> None:
    found = answer([*MAJORITY, *runs("full", 0.6, 0.6)])
    assert found.sentences == (
        "Keep dense attention (full): 60.0 ± 0.5 % test accuracy; nothing else finished, so there is nothing to "
        "compare it with.",
    )


def test_a_slower_winner_is_recommended_for_its_accuracy_and_says_so() -> None:
    found = answer([*MAJORITY, *runs("full", 0.5, 0.5), *runs("local", 0.6, 0.6)], profile("local", 50, slope=2))
    assert found.verdict is Verdict.USE
    assert "slower than dense fused attention (10.0 ms)" in found.sentences[1]
    assert (
        "recommended for its accuracy alone, and it is not faster than dense attention even at 4,000"
        in found.sentences[1]
    )


def test_a_winner_without_a_speed_says_that_accuracy_alone_decided() -> None:
    found = answer([*MAJORITY, *runs("full", 0.5, 0.5), *runs("local", 0.6, 0.6)])
    assert found.sentences[1] == (
        "Its speed at 1,000 tokens was not measured, so accuracy alone decides: run `subquad profile`."
    )


def test_a_measured_mechanism_goes_before_an_unmeasured_equal() -> None:
    found = answer([*MAJORITY, *runs("aft", 0.505, 0.505), *runs("local", 0.50, 0.50)], profile("local", 5))
    assert found.winner is not None
    assert found.winner.name == "local"


def test_a_single_seed_is_admitted() -> None:
    found = answer([*MAJORITY, *runs("full", 0.5), *runs("local", 0.5)], profile("local", 5))
    assert found.sentences[2] == (
        "Note: only one seed was run, so the errors speak of the size of the test split alone."
    )


def test_a_missing_guess_and_unequal_parameters_are_admitted() -> None:
    found = answer([*runs("full", 0.5, 0.5), *runs("local", 0.5, 0.5, parameters=2000)], profile("local", 5))
    assert found.sentences[2] == (
        "Note: the guess without a model is not recorded, so it is open whether the task was learned; the "
        "parameters of local are more than 10 % from those of the dense model."
    )


def test_many_equals_are_not_all_listed() -> None:
    names = ("aft", "linear", "linformer", "local", "performer", "reformer", "topk")
    records = [*MAJORITY, *(run for name in names for run in runs(name, 0.5, 0.5))]
    found = answer(records, *(profile(name, 1 + i) for i, name in enumerate(names)))
    assert "linear (50.0 ± 0.5 %), linformer (50.0 ± 0.5 %), local (50.0 ± 0.5 %) and 3 others" in found.sentences[0]


def test_every_answer_has_one_to_three_sentences() -> None:
    found = answer([*runs("full", 0.5), *runs("local", 0.5, parameters=5000)], profile("local", 50))
    assert 1 <= len(found.sentences) <= 3


def test_recommend_takes_one_comparison() -> None:
    records = Records(runs=(*MAJORITY, *runs("full", 0.5, 0.5)), profiles=(FULL_PROFILE,))
    (comparison,) = comparisons(records)
    found = recommend(comparison)
    assert recommend(comparison) == found


def test_fewer_bits_win() -> None:
    found = answer([*UNIGRAM, *bits_runs("local", 1.9, 1.9), *bits_runs("linear", 2.1, 2.1)], profile("local", 5))
    assert found.winner is not None
    assert found.winner.name == "local"
    assert found.sentences[0] == (
        "Use local: 1.900 ± 0.010 bits/byte on test, 0.200 bits/byte better than the next, linear "
        "(2.100 ± 0.010 bits/byte)."
    )


def test_bits_within_two_standard_errors_are_equal_and_speed_decides() -> None:
    records = [*UNIGRAM, *bits_runs("local", 1.9, 1.9), *bits_runs("linear", 1.92, 1.92)]
    found = answer(records, profile("local", 5), profile("linear", 4))
    assert found.winner is not None
    assert found.winner.name == "linear"


def test_no_fewer_bits_than_the_unigram_code_means_train_longer() -> None:
    found = answer([*UNIGRAM, *bits_runs("full", 4.79), *bits_runs("local", 5.5)])
    assert found.verdict is Verdict.TRAIN_LONGER
    assert found.sentences[0].startswith("No mechanism has learned the task: train longer. The best, full, reaches ")
    assert found.sentences[0].endswith(
        "4.790 ± 0.010 bits/byte on test, which two standard errors don't separate "
        "from the unigram guess of 4.800 bits/byte."
    )


def test_a_score_below_the_guess_is_not_called_inseparable_from_it() -> None:
    found = answer([*UNIGRAM, *bits_runs("full", 7.08), *bits_runs("local", 7.5)])
    assert found.verdict is Verdict.TRAIN_LONGER
    assert found.sentences[0].endswith(
        "7.080 ± 0.010 bits/byte on test, which is no better than the unigram guess of 4.800 bits/byte."
    )


def test_dense_attention_may_win_by_bits() -> None:
    found = answer([*UNIGRAM, *bits_runs("full", 1.5, 1.5), *bits_runs("local", 1.9, 1.9)], profile("local", 5))
    assert found.verdict is Verdict.KEEP_DENSE
    assert found.sentences[1].startswith("The runner-up, local, is worse by 0.400 bits/byte; by time, it is faster")
