"""Text comes byte by byte from a saved model, the same for the same seed, and what isn't text is made visible."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Invoke

from subquad.benchmark.plan import read_data
from subquad.build import list_mixers, mixer_config
from subquad.cli.generation import Wish, load_model, longest_text, visible, written
from subquad.models import SubquadConfig, SubquadForCausalLM, SubquadForSequenceClassification
from subquad.parallel.settings import Settings
from subquad.parallel.train import build_model
from subquad.training.objectives.registry import objective_of
from subquad.training.presets import load_preset

MIXERS = {"constant": {"name": "local", "window": 5}, "growing": {"name": "full"}, "stateless": {"name": "gmlp"}}


def small_config(**changes: Any) -> SubquadConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return SubquadConfig(**{**sizes, "byte_ids": True, "pad_token_id": 256, "max_position_embeddings": 128, **changes})


def saved(folder: Path, kind: str, **changes: Any) -> Path:
    torch.manual_seed(0)
    feedforward = None if kind == "stateless" else "mlp"
    config = small_config(**{"mixer": MIXERS[kind], "feedforward": feedforward, **changes})
    SubquadForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=MIXERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp(request.param), request.param)


def test_text_goes_to_standard_output_and_the_speed_to_standard_error(model: Path, invoke: Invoke) -> None:
    ran = invoke("generate", str(model), "--prompt", "Once", "--tokens", "12")
    assert ran.exit_code == 0, ran.err
    assert ran.out.startswith("Once")
    assert ran.out.endswith("\n")
    assert "tokens/second" in ran.err


def test_the_same_seed_writes_the_same_text_and_another_another(model: Path, invoke: Invoke) -> None:
    def text(*options: str) -> str:
        options = ("--prompt", "Once", "--tokens", "20", *options)
        return invoke("generate", str(model), *options, "--json").document["text"]

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    assert text("--top-k", "1") == text("--temperature", "0") == text("--temperature", "0", "--seed", "9")
    assert text("--top-p", "0.001") == text("--top-k", "1")


def test_each_byte_is_the_likeliest_after_all_before_it(model: Path) -> None:
    loaded = load_model(model)
    tokens = torch.tensor([[79, 110, 99, 101]])
    wish = Wish(tokens=6, temperature=0, top_k=None, top_p=None, seed=0)
    for token in written(loaded, tokens, wish, wish.sampling()):
        with torch.no_grad():
            assert token == int(loaded(tokens).logits[0, -1, :256].argmax())
        tokens = torch.cat((tokens, torch.tensor([[token]])), dim=1)


def prefer(model: SubquadForCausalLM, token: int, folder: Path) -> None:
    """Save the model as one that says this token always, where it may."""
    with torch.no_grad():
        model.lm_head.project.bias[token] = 1e4
    model.save_pretrained(folder)


@pytest.mark.parametrize("padding", [256, 66])
def test_padding_is_never_written(padding: int, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "constant", pad_token_id=padding)
    prefer(SubquadForCausalLM.from_pretrained(folder), padding, folder)
    wish = Wish(tokens=20, temperature=1.0, top_k=None, top_p=None, seed=0)
    tokens = list(written(load_model(folder), torch.tensor([[65]]), wish, wish.sampling()))
    assert padding not in tokens
    assert max(tokens) < 256


def test_the_beginning_may_be_a_file_of_any_bytes(model: Path, tmp_path: Path, invoke: Invoke) -> None:
    path = tmp_path / "beginning"
    path.write_bytes(b"caf\xc3\xa9 \xff\x1b[31m")
    ran = invoke("generate", str(model), "--prompt-file", str(path), "--tokens", "1")
    assert ran.out.startswith("café \ufffd␛[31m")


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert visible("a\x1b[2J\x07\x7f\x9b\tb\nc") == "a␛[2J␇␡\ufffd\tb\nc"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the text needs a beginning of at least one byte: --prompt TEXT or --prompt-file FILE"),
        (["--prompt", "a", "--prompt-file", "b"], "give the beginning once"),
        (["--prompt", "a", "--temperature", "0", "--top-k", "3"], "--temperature 0 takes the likeliest byte"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p must lie in (0, 1], got 1.5"),
        (["--prompt-file", "nowhere"], "cannot use nowhere: No such file or directory"),
    ],
)
def test_wrong_use_is_named(
    options: list[str], message: str, model: Path, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = invoke("generate", str(model), *options)
    assert ran.exit_code == 2
    assert message in ran.err
    assert ran.out == ""


def test_a_folder_that_holds_no_such_model_is_named(tmp_path: Path, invoke: Invoke) -> None:
    ran = invoke("generate", str(tmp_path / "none"), "--prompt", "a")
    assert "there is no model (no config.json); `subquad run --save-model` writes one" in ran.err
    config = SubquadConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config.num_labels = 2
    SubquadForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    ran = invoke("generate", str(tmp_path / "classifier"), "--prompt", "a")
    assert ran.exit_code == 2
    assert "text is written by a SubquadForCausalLM, this is SubquadForSequenceClassification" in ran.err
    (tmp_path / "classifier" / "config.json").write_text("{")
    assert "config.json is damaged" in invoke("generate", str(tmp_path / "classifier"), "--prompt", "a").err


def test_a_model_of_the_training_program_says_the_byte_that_it_has_learned(tmp_path: Path, invoke: Invoke) -> None:
    model = build_model(Settings(layers=1, width=16, heads=2, hidden=16))
    assert isinstance(model, SubquadForCausalLM)
    prefer(model, ord("A"), tmp_path)
    assert invoke("generate", str(tmp_path), "--prompt", "<", "--tokens", "5").out == "<AAAAA\n"


@pytest.mark.parametrize("vocab_size", [130, 257])
def test_a_model_that_is_not_marked_as_one_of_bytes_is_refused_until_it_is(
    vocab_size: int, tmp_path: Path, invoke: Invoke
) -> None:
    saved(tmp_path, "constant", vocab_size=vocab_size, byte_ids=False)
    ran = invoke("generate", str(tmp_path), "--prompt", "a", "--tokens", "3")
    assert ran.exit_code == 2
    assert ran.out == ""
    config = tmp_path / "config.json"
    assert "this model isn't marked as one of bytes" in ran.err
    assert f'write "byte_ids": true into {config}' in ran.err
    config.write_text(json.dumps({**json.loads(config.read_text()), "byte_ids": True}))
    ran = invoke("generate", str(tmp_path), "--prompt", "a", "--tokens", "3")
    assert (ran.exit_code == 0) == (vocab_size == 257)
    assert ("byte_ids=True needs vocab_size >= 256, got 130" in ran.err) == (vocab_size == 130)


@pytest.mark.parametrize(("task", "marked"), [("text-lm", True), ("mqar", False)])
def test_models_of_bytes_alone_are_marked_as_such(task: str, marked: bool, tmp_path: Path) -> None:
    preset = load_preset(task, "quick")
    few = replace(preset.data, train=5, validation=5, test=5)
    data = read_data(replace(preset, data=few), tmp_path, generated=True)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    objective_of(data, seed=0).build(sizes, mixer_config("full")).save_pretrained(tmp_path / "m")
    assert data.vocab_size == 257
    if marked:
        load_model(tmp_path / "m")
    else:
        with pytest.raises(ValueError, match="this model isn't marked as one of bytes"):
            load_model(tmp_path / "m")


def test_the_beginning_may_be_any_bytes_on_the_command_line(model: Path, invoke: Invoke) -> None:
    given = os.fsdecode(b"caf\xe9")  # as Python hands over an argument that is no UTF-8
    ran = invoke("generate", str(model), "--prompt", given, "--tokens", "1")
    assert ran.exit_code == 0, ran.err
    assert ran.out.startswith("caf\ufffd")


BOUND: list[dict[str, Any]] = [
    {"mixer": {"name": "aft", "kind": "local", "window": 5}},
    {"mixer": "gmlp", "feedforward": None},
    {"mixer": "cosformer"},
    {"positions": "learned"},
    {"positions": "axial", "mixer": {"name": "local", "window": 5}},
]


@pytest.mark.parametrize("changes", BOUND, ids=str)
def test_a_text_may_be_as_long_as_the_model_can_read_and_one_byte(
    changes: dict[str, Any], tmp_path: Path, invoke: Invoke
) -> None:
    model = str(saved(tmp_path, "growing", max_position_embeddings=16, **changes))
    ran = invoke("generate", model, "--prompt", "seven b", "--tokens", "11")
    assert ran.exit_code == 2
    assert ran.out == ""
    said = " ".join(ran.err.split())
    assert (
        "--tokens 11: the model can read no more than 16 bytes, and the beginning has 7; the largest --tokens is 10"
        in said
    )
    assert invoke("generate", model, "--prompt", "seven b", "--tokens", "10", "--json").document["bytes"] == 10
    ran = invoke("generate", model, "--prompt", "b" * 17, "--tokens", "1")
    assert ran.exit_code == 2
    assert "the beginning has 17 bytes, but the model can read no more than 16" in " ".join(ran.err.split())


@pytest.mark.parametrize("mixer", list_mixers(causal=True))
def test_a_model_writes_beyond_its_positions_exactly_where_it_has_no_longest_text(mixer: str) -> None:
    feedforward = None if mixer_config(mixer).placement == "block" else "mlp"
    model = SubquadForCausalLM(small_config(max_position_embeddings=16, mixer=mixer, feedforward=feedforward)).eval()
    wish = Wish(tokens=18, temperature=0, top_k=None, top_p=None, seed=0)
    if longest_text(model.config) is None:
        assert len(list(written(model, torch.tensor([[65]]), wish, None))) == 18
    else:
        with pytest.raises(ValueError, match="16"):
            list(written(model, torch.tensor([[65]]), wish, None))
