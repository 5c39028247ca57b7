import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stand_ins import OWN, MakePlan

from subquad.benchmark.mixers import NamedMixer
from subquad.benchmark.plan import build_model, sketch, task_info
from subquad.mechanisms.full import FullConfig
from subquad.records.schema import Status
from subquad.tasks.kinds import ClassificationData


def test_a_mechanism_that_is_only_causal_classifies_causally_with_mean_pooling(
    plan: MakePlan, tiny_data: ClassificationData
) -> None:
    settings = plan("CausalConfig").model_settings()
    assert (settings["causal"], settings["pooling"]) == (True, "mean")
    model = build_model(plan("CausalConfig"), tiny_data)
    assert (model.config.causal, model.config.pooling) == (True, "mean")
    settings = plan("full").model_settings()
    assert (settings["causal"], settings["pooling"]) == (False, "cls")


def test_a_block_mixer_has_no_feedforward(plan: MakePlan) -> None:
    class BlockConfig(FullConfig):
        placement = "block"

    blocked = replace(plan("full"), mixer=NamedMixer("block", BlockConfig()))
    assert blocked.model_settings()["feedforward"] is None
    assert "feedforward" not in plan("full").model_settings()


def test_the_sketch_has_the_size_of_the_model_and_allocates_nothing(
    plan: MakePlan, tiny_data: ClassificationData
) -> None:
    found = sketch(plan("linear"), tiny_data)
    model = build_model(plan("linear"), tiny_data)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.cost is not None
    assert found.cost.flops == model.model.cost(tiny_data.max_length).flops
    assert (found.status, found.obstacle) == (Status.OK, "")


@pytest.mark.parametrize(
    ("mixer", "status", "obstacle"),
    [
        ("local:window=8", Status.NOT_APPLICABLE, "7 or 9"),
        ("ShortConfig", Status.NOT_APPLICABLE, "short: at most 3 tokens"),
        ("BrokenConfig", Status.FAILED, "KeyError: 'width'"),
    ],
)
def test_what_can_not_be_built_says_why(
    plan: MakePlan, tiny_data: ClassificationData, mixer: str, status: Status, obstacle: str
) -> None:
    found = sketch(plan(mixer), tiny_data)
    assert (found.parameters, found.cost, found.status) == (0, None, status)
    assert obstacle in found.obstacle


def test_equal_seeds_build_equal_models(plan: MakePlan, tiny_data: ClassificationData) -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(build_model(plan("performer"), tiny_data).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_command_makes_the_run_again(plan: MakePlan, tmp_path: Path) -> None:
    made = plan("SoundConfig:scale=2.0", seed=4)
    words = shlex.split(made.command)
    assert words[:2] == ["subquad", "run"]
    assert words[words.index("--mixer") + 1] == f"{OWN}:SoundConfig:scale=2.0"
    assert words[words.index("--preset") + 1].endswith("tiny.toml")
    assert words[words.index("--seed") + 1] == "4"
    assert "--data" not in words
    theirs = replace(made, data=tmp_path / "my data", generated=False)
    assert shlex.split(theirs.command)[-2:] == ["--data", str(tmp_path / "my data")]


def test_the_task_is_recorded_with_its_sizes(tiny_data: ClassificationData) -> None:
    info = task_info(tiny_data)
    assert (info.train_size, info.validation_size, info.test_size) == (200, 60, 60)
    assert (info.title, info.is_lra, info.max_length) == ("Tiny ListOps", False, 24)
