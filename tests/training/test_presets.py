import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from subquad.build import list_mixers
from subquad.training.presets import (
    PRESETS_DIRECTORY,
    ModelSettings,
    Preset,
    ProfileSettings,
    TrainingSettings,
    list_presets,
    load_preset,
)

TINY = (Path(__file__).parents[1] / "presets" / "tiny.toml").read_text(encoding="utf-8")


def values(table: Any) -> list[Any]:
    if isinstance(table, dict):
        return [value for each in table.values() for value in values(each)]
    return [value for each in table for value in values(each)] if isinstance(table, list) else [table]


def test_there_are_four_presets_of_listops() -> None:
    assert list_presets("listops") == ["paper", "quick", "release", "small"]


@pytest.mark.parametrize("name", list_presets("listops"))
def test_every_preset_loads_and_ends_with_an_evaluation(name: str) -> None:
    preset = load_preset("listops", name)
    assert (preset.task, preset.name, preset.source, preset.data.name) == ("listops", name, name, name)
    assert preset.training.steps % preset.training.evaluate_every == 0
    assert preset.profile.embed_dim == preset.model.hidden_size
    assert preset.profile.num_heads == preset.model.num_attention_heads


@pytest.mark.parametrize("name", list_presets("listops"))
def test_no_preset_names_a_mechanism(name: str) -> None:
    tables = tomllib.loads((PRESETS_DIRECTORY / "listops" / f"{name}.toml").read_text(encoding="utf-8"))
    del tables["training"]["schedule"]  # a schedule may be linear; that is no mechanism
    assert not set(list_mixers()) & {value for value in values(tables) if isinstance(value, str)}
    names = {field.name for table in (ModelSettings, TrainingSettings, ProfileSettings) for field in fields(table)}
    assert not {"mixer", "mixers", "feedforward"} & names


def test_an_unknown_preset_names_the_nearest_and_the_other_way() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'qick' .*did you mean 'quick'\?.*or name a file of your own"):
        load_preset("listops", "qick")


def own(folder: Path, text: str, name: str = "mine.toml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_a_file_of_the_users_own_is_a_preset(tmp_path: Path) -> None:
    preset = load_preset("listops", own(tmp_path, TINY))
    assert preset.source == str(tmp_path / "mine.toml")
    assert preset.data.name == "mine"
    assert preset.training.steps == 24


def test_edited_training_is_another_preset_and_other_edits_are_seen_elsewhere(tmp_path: Path) -> None:
    def name(text: str) -> str:
        return load_preset("listops", own(tmp_path, text)).name

    assert name(TINY) == name(TINY + "\n# a remark")
    assert name(TINY).startswith("mine-")
    assert name(TINY.replace("5e-3", "6e-3")) != name(TINY)
    assert name(TINY.replace("5e-3", "0.005")) == name(TINY)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[model]", "[model", r"not valid TOML: .*line 10"),
        ("[model]", "[modell]", r"expected the tables .*'model'.*got .*'modell'"),
        ("hidden_size = 16", "hidden_size = '16'", r"\[model\]: option 'hidden_size' must be int, got '16'"),
        ("hidden_size = 16", "hidden_sizes = 16", r"unknown option 'hidden_sizes'; did you mean 'hidden_size'"),
        ("hidden_size = 16", "hidden_size = 15", r"hidden_size=15 must be a multiple of num_attention_heads=2"),
        ("num_hidden_layers = 1", "num_hidden_layers = 0", r"\[model\]: num_hidden_layers must be at least 1, got 0"),
        ("dropout = 0.1", "dropout = 1.0", r"dropout must be at least 0 and below 1, got 1.0"),
        ("steps = 24", "steps = 25", r"steps=25 must be a multiple of evaluate_every=8"),
        ("steps = 24", "", r"option 'steps' is required"),
        ("batch_size = 8", "batch_size = 0", r"\[training\]: batch_size must be at least 1, got 0"),
        ("5e-3", "nan", r"learning_rate must be positive, got nan"),
        ("[training]", "[training]\nlabel_smoothing = 1.0", r"label_smoothing must be at least 0 and below 1, got 1.0"),
        ("5e-3", "-1.0", r"learning_rate must be positive, got -1.0"),
        ("warmup_steps = 4", "warmup_steps = -4", r"warmup_steps must be at least 0, got -4"),
        ("'cosine'", "'cosin'", r"option 'schedule' must be one of .*'cosine'.*, got 'cosin'"),
        ("[16, 32]", "[32, 16]", r"\[profile\]: lengths must be positive and increasing, got \[32, 16\]"),
        ("[16, 32]", "[]", r"lengths must be positive and increasing, got \[\]"),
        ("rounds = 2", "rounds = 201", r"rounds must be at most 200, got 201"),
        ("train = 200", "train = 0", r"train must be at least 1, got 0"),
        ("train = 200", "mixer = 'local'", r"unknown: mixer"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = TINY.replace('"', "'")
    assert old in text
    path = own(tmp_path, text.replace(old, new))
    with pytest.raises(ValueError, match=rf"mine\.toml: .*{message}"):
        load_preset("listops", path)


def test_a_file_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.toml: there is no such preset file"):
        load_preset("listops", str(tmp_path / "nowhere.toml"))
    with pytest.raises(ValueError, match=r"my preset\.toml: folders are called after the file"):
        load_preset("listops", own(tmp_path, TINY, "my preset.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bytes\.toml: not valid TOML"):
        load_preset("listops", str(tmp_path / "bytes.toml"))
    with pytest.raises(ValueError, match=r"flat\.toml: .*expected the tables"):
        load_preset("listops", own(tmp_path, "data = 1\nmodel = 2\ntraining = 3\nprofile = 4\n", "flat.toml"))


def test_the_records_keep_the_sizes_of_the_model(tiny: Preset) -> None:
    smaller = replace(tiny, model=replace(tiny.model, hidden_size=8))
    assert smaller.model_dict()["hidden_size"] == 8
    assert "mixer" not in smaller.model_dict()


@pytest.mark.parametrize("source", ["quick", "mine.toml"])
def test_training_settings_are_changed_behind_colons(source: str, tmp_path: Path) -> None:
    name = own(tmp_path, TINY) if source == "mine.toml" else source
    plain, changed = load_preset("listops", name), load_preset("listops", f"{name}:learning_rate=1e-4:beta2=0.95")
    assert changed.training == replace(plain.training, learning_rate=1e-4, beta2=0.95)
    assert (changed.data, changed.model, changed.profile) == (plain.data, plain.model, plain.profile)
    assert (plain.changed, changed.changed) == ({}, {"learning_rate": 1e-4, "beta2": 0.95})
    assert changed.source == plain.source == name
    assert load_preset("listops", changed.text) == changed
    assert changed.text == f"{name}:learning_rate=0.0001:beta2=0.95"


def test_the_name_of_a_preset_is_one_with_its_training_settings(tiny: Preset) -> None:
    slow = tiny.with_training({"learning_rate": 1e-4})
    assert len({tiny.name, slow.name, slow.with_training({"steps": 8}).name}) == 3
    assert slow.name.startswith("tiny-")
    assert load_preset("listops", "quick:beta2=0.95").name.startswith("quick-")
    assert tiny.with_training({"weight_decay": 0.01, "batch_size": 8}) == tiny  # as it is
    assert slow.with_training({"steps": 8}).name == tiny.with_training({"steps": 8, "learning_rate": 1e-4}).name
    assert load_preset("listops", "quick").name == "quick"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("learning_rat=1", r"preset quick, \[training\]: unknown option 'learning_rat'; did you mean 'learning_rate'"),
        ("hidden_size=8", r"unknown option 'hidden_size'"),
        ("learning_rate=x", r"option 'learning_rate' must be float, got 'x'"),
        ("steps=7", r"steps=7 must be a multiple of evaluate_every"),
        ("steps", r"'quick:steps': expected options as name=value behind a colon, got 'steps'"),
        ("steps=8:steps=16", r"steps is given twice"),
    ],
)
def test_a_wrong_change_is_named(changes: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_preset("listops", f"quick:{changes}")


def test_a_setting_is_changed_once(tiny: Preset) -> None:
    with pytest.raises(ValueError, match=r"tiny\.toml:steps=8: steps is changed already; give it once"):
        tiny.with_training({"steps": 8}).with_training({"steps": 16})


def test_a_stream_needs_positions_without_a_table_after_a_change_too(tiny: Preset) -> None:
    learned = replace(tiny, model=replace(tiny.model, positions="learned"))
    with pytest.raises(ValueError, match="stream = true goes beyond any table of positions, got positions = 'learned'"):
        learned.with_training({"stream": True})


def test_text_as_a_stream_has_a_preset_of_its_own() -> None:
    assert {name: load_preset("text-lm", name).training.stream for name in list_presets("text-lm")} == {
        "quick": False,
        "stream": True,
    }
