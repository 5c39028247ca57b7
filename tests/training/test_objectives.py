"""Every objective trains, is scored as it says, and continues bit for bit."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_data import EXTRA, PAD, VOCABULARY, toy, trainer_of

from subquad.benchmark.mixers import parse_mixer
from subquad.labels import IGNORED
from subquad.training.objectives.base import Objective
from subquad.training.objectives.registry import OBJECTIVES, objective_of
from subquad.training.order import Visit
from subquad.training.presets import Preset
from subquad.training.scoring import Measured

KINDS = ("classification", "causal", "answers", "masked", "seq2seq")


def objective(kind: str, seed: int = 0) -> Objective[Any, Any]:
    return objective_of(toy(kind), seed=seed)


def test_every_kind_of_data_has_its_objective() -> None:
    assert {toy(kind).objective for kind in KINDS} == set(OBJECTIVES)


class StoppedError(Exception):
    pass


def stop(step: int, steps: int, validation: float | None) -> None:
    if step == 13:
        raise StoppedError


@pytest.mark.parametrize("kind", KINDS)
def test_training_beats_the_guess_and_continues_bit_for_bit(kind: str, tiny: Preset, tmp_path: Path) -> None:
    data = toy(kind)
    options = {"steps": 40, "evaluate_every": 8, "learning_rate": 2e-2}
    whole = trainer_of(data, tiny, tmp_path / "whole", **options).fit()
    with pytest.raises(StoppedError):
        trainer_of(data, tiny, tmp_path / "parts", progress=stop, **options).fit()
    torch.rand(100)
    parts = trainer_of(data, tiny, tmp_path / "parts", **options).fit()
    assert replace(parts, seconds=0.0) == replace(whole, seconds=0.0)
    kind_of_metric = objective(kind).kind
    best = whole.best_validation[2]
    assert kind_of_metric.goodness(best.estimate.value) > kind_of_metric.goodness(data.guess().test)
    assert whole.carries_state is None


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_is_what_the_guess_counts(kind: str, tiny: Preset, tmp_path: Path) -> None:
    measured = trainer_of(toy(kind), tiny, tmp_path)._test()
    if kind != "masked":
        assert measured.asked == toy(kind).guess().asked
    assert measured.examples == 40


def by_hand(kind: str, model: Any) -> list[float]:
    """Right answers or bits of the test split, example by example without padding."""
    data, found = toy(kind), []
    for index in range(40):
        example = objective(kind).example(data.test, Visit(index, -1))
        arguments = {name: torch.from_numpy(np.asarray(array)).long()[None] for name, array in example.items()}
        with torch.no_grad():
            output = model.eval()(**arguments)
        labels, logits = arguments["labels"][0], output.logits[0]
        if kind in ("causal", "answers"):
            labels, logits = labels[1:], logits[:-1]
        if kind == "classification":
            labels, logits = labels[None], logits[None]
        asked = labels != IGNORED
        chosen = logits[asked].log_softmax(dim=-1).gather(1, labels[asked, None])
        right = (logits[asked].argmax(dim=-1) == labels[asked]).double()
        found.append(float(right.sum() if data.metric == "accuracy" else -chosen.sum() / np.log(2)))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_batches_change_no_score(kind: str, tiny: Preset, tmp_path: Path) -> None:
    trainer = trainer_of(toy(kind), tiny, tmp_path)
    measured: Measured = trainer._test()
    assert measured.estimate.value * measured.asked == pytest.approx(sum(by_hand(kind, trainer.model)), rel=1e-4)


def test_scores_are_told_apart_by_the_length_of_the_context(tiny: Preset, tmp_path: Path) -> None:
    measured = trainer_of(toy("causal"), tiny, tmp_path)._test()
    assert [(bucket.first, bucket.last) for bucket in measured.by_position] == [(1, 1), (2, 3), (4, 7), (8, 11)]
    assert sum(bucket.asked for bucket in measured.by_position) == measured.asked
    total = sum(bucket.value * bucket.asked for bucket in measured.by_position)
    assert total == pytest.approx(measured.estimate.value * measured.asked)
    assert trainer_of(toy("masked"), tiny, tmp_path)._test().by_position == ()


def test_a_causal_example_asks_for_nothing_at_its_first_position() -> None:
    data = toy("causal")
    example = objective("causal").example(data.test, Visit(3, -1))
    assert example["labels"].tolist() == [IGNORED, *example["input_ids"][1:].tolist()]
    assert not objective("causal").example(data.test, Visit(3, -1, asked=False))["labels"].max() > IGNORED


def test_masks_differ_by_seed_and_visit_and_stay_in_evaluation() -> None:
    data = toy("masked")

    def masked(seed: int, visit: Visit) -> list[int]:
        return objective("masked", seed).example(data.train, visit)["input_ids"].tolist()

    assert masked(0, Visit(4, 0)) == masked(0, Visit(4, 0))
    drawn = {tuple(masked(seed, Visit(4, number))) for seed in range(3) for number in range(5)}
    assert len(drawn) > 5
    assert masked(0, Visit(4, -1)) == masked(1, Visit(4, -1))


def test_of_the_chosen_tokens_most_are_masked_some_random_and_some_kept() -> None:
    data, fates = toy("masked"), {"masked": 0, "random": 0, "kept": 0}
    masking = objective("masked")
    for index, number in itertools.product(range(40), range(20)):
        tokens = data.train.inputs[index].astype(np.int64)
        example = masking.example(data.train, Visit(index, number))
        chosen = example["labels"] != IGNORED
        assert chosen.sum() == max(1, round(0.3 * len(tokens)))
        assert np.array_equal(example["labels"][chosen], tokens[chosen])
        assert np.array_equal(example["input_ids"][~chosen], tokens[~chosen])
        for shown, true in zip(example["input_ids"][chosen], tokens[chosen], strict=True):
            assert shown != PAD
            fates["masked" if shown == EXTRA else "kept" if shown == true else "random"] += 1
    total = sum(fates.values())
    assert fates["masked"] / total == pytest.approx(0.8, abs=0.05)
    assert fates["random"] / total == pytest.approx(0.1 * (VOCABULARY - 3) / (VOCABULARY - 2), abs=0.04)


def test_a_decoder_reads_the_target_behind_the_start_token() -> None:
    data = toy("seq2seq")
    example = objective("seq2seq").example(data.test, Visit(2, -1))
    target = data.test.targets[2].tolist()
    assert example["decoder_input_ids"].tolist() == [EXTRA, *target]
    assert example["labels"].tolist() == [*target, EXTRA + 1]


@pytest.mark.parametrize(
    ("kind", "mixer", "message"),
    [
        ("causal", "linformer", "causal"),
        ("masked", "ngram", "causal"),
        ("seq2seq", "linformer", "causal"),
    ],
)
def test_a_mechanism_that_can_not_do_it_says_so(kind: str, mixer: str, message: str, tiny: Preset) -> None:
    config = parse_mixer(mixer).config
    asked = objective(kind)
    with pytest.raises(ValueError, match=message):
        asked.build(asked.model_settings(tiny.model_dict(), config), config)


@pytest.mark.parametrize(
    ("kind", "mixer", "expected"),
    [
        ("classification", "full", {"causal": False, "pooling": "cls"}),
        ("classification", "ngram", {"causal": True, "pooling": "mean"}),
        ("classification", "gmlp", {"causal": False, "feedforward": None}),
        ("causal", "full", {"causal": True}),
        ("causal", "gmlp", {"causal": True, "feedforward": None}),
        ("masked", "full", {"causal": False}),
        ("seq2seq", "ngram", {"causal": True, "encoder_mixer": "full", "cross_mixer": "full"}),
        ("seq2seq", "gmlp", {"feedforward": None, "encoder_feedforward": "mlp"}),
    ],
)
def test_the_model_follows_objective_and_mechanism(
    kind: str, mixer: str, expected: dict[str, Any], tiny: Preset
) -> None:
    settings = objective(kind).model_settings(tiny.model_dict(), parse_mixer(mixer).config)
    assert {name: settings[name] for name in expected} == expected
