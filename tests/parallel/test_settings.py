"""The command line of the training program."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from subquad.parallel.settings import Settings, parse


def test_every_setting_is_an_option_with_its_default() -> None:
    assert parse([]) == Settings()


def test_options_are_read() -> None:
    written = '{"name": "switch", "experts": 4}'
    given = parse(["--feedforward", written, "--learning-rate", "0.5", "--text", "a", "b", "--resume", "--steps", "7"])
    changes = {"feedforward": {"name": "switch", "experts": 4}, "learning_rate": 0.5, "steps": 7, "resume": True}
    assert given == replace(Settings(), **changes, text=("a", "b"))


def test_json_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--mixer", '{"name": '])
    assert "argument --mixer: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch must be above 0, got 0"),
        (["--checkpoint-every", "-1"], "--checkpoint-every must be above 0, got -1"),
        (["--length", "1"], "--length must be at least 2, got 1"),
        (["--masked-share", "1"], r"--masked-share must be in \(0, 1\), got 1"),
    ],
)
def test_values_out_of_range_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(arguments)


def test_a_run_goes_on_with_the_same_settings_on_other_processes() -> None:
    before = Settings().fixed()
    Settings(steps=7, model_parallel=2, resume=True).check_continues(before)
    with pytest.raises(ValueError, match="the run that --resume goes on with had --batch 32, not 16"):
        Settings(batch=16).check_continues(before)


def test_only_what_decides_the_result_is_fixed() -> None:
    assert {"seed", "batch", "mixer", "dtype"} <= set(Settings().fixed())
    assert {field.name for field in fields(Settings)} - set(Settings().fixed()) >= {"output", "model_parallel"}
