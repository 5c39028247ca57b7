"""Text comes byte by byte from a saved model, the same for the same seed, and what isn't text is made visible."""

from pathlib import Path

import pytest
import torch
from command_line import Invoke

from subquad.cli.generation import Wish, load_model, visible, written
from subquad.models import SubquadConfig, SubquadForCausalLM, SubquadForSequenceClassification

MIXERS = {"constant": {"name": "local", "window": 5}, "growing": {"name": "full"}, "stateless": {"name": "gmlp"}}


def saved(folder: Path, kind: str, vocab_size: int = 257) -> Path:
    torch.manual_seed(0)
    feedforward = None if kind == "stateless" else "mlp"
    config = SubquadConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=128,
        mixer=MIXERS[kind],
        feedforward=feedforward,
        pad_token_id=vocab_size - 1,
    )
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


def test_padding_is_never_written(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "constant")
    model = SubquadForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.project.bias[256] = 1e4
    model.save_pretrained(folder)
    wish = Wish(tokens=20, temperature=1.0, top_k=None, top_p=None, seed=0)
    assert all(token < 256 for token in written(load_model(folder), torch.tensor([[65]]), wish, wish.sampling()))


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


def test_a_prompt_outside_the_vocabulary_is_named(tmp_path: Path, invoke: Invoke) -> None:
    ran = invoke("generate", str(saved(tmp_path / "small", "constant", vocab_size=20)), "--prompt", "a")
    assert ran.exit_code == 2
    assert "the prompt has the byte 97, but the model knows 20 ids only; it was not trained on bytes" in ran.err
