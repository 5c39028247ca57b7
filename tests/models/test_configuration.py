"""The models' config: tiling, errors, and the written form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from small_models import classifier, config, small
from transformers import AutoConfig

from subquad import Cost, Dims, MixerConfig, TokenMixer, Traits
from subquad.build import make_dims, mixer_config
from subquad.mechanisms.full import Full
from subquad.models import SubquadConfig, SubquadForSequenceClassification
from subquad.models.block import Block
from subquad.registry import MIXERS, register


def test_mixers_are_tiled_over_the_depth() -> None:
    listed = config(mixer=["full", {"name": "local", "window": 5}], num_hidden_layers=5)
    assert [mixer.name for mixer in listed.layer_mixers()] == ["full", "local", "full", "local", "full"]
    assert listed.layer_mixers()[1] == mixer_config("local", window=5)


def test_the_feedforward_takes_width_and_dropout_from_the_config_unless_it_names_its_own() -> None:
    listed = config(feedforward=["mlp", {"name": "mlp", "hidden_dim": 7}, None], dropout=0.25)
    first, second, third = listed.layer_feedforwards()
    assert first is not None
    assert second is not None
    assert third is None
    assert first.to_dict() == {"name": "mlp", "dropout": 0.25, "hidden_dim": 24, "activation": "gelu"}
    assert second.to_dict()["hidden_dim"] == 7


def test_a_layer_may_have_no_feedforward() -> None:
    model = classifier(feedforward=None)
    assert all(block.feedforward is None for block in model.model.blocks)
    assert model(torch.ones(1, 4, dtype=torch.int64)).logits.shape == (1, 3)


def test_the_config_survives_its_written_form() -> None:
    listed = config(mixer=[small("longformer"), "full"], global_tokens="first", head_dim=4, positions="rotary")
    again = SubquadConfig.from_dict(listed.to_dict())
    assert again.to_dict() == listed.to_dict()
    assert again.layer_mixers() == listed.layer_mixers()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "pst"}, r"norm='pst' is not supported; did you mean 'post'\?|norm"),
        ({"pooling": "max"}, "pooling"),
        (
            {"positions": "axail"},
            "positions='axail' is not supported; did you mean 'axial'.*Known: axial, learned, none",
        ),
        ({"residual": "reverse"}, "residual='reverse' is not supported; did you mean 'reversible'.*Known: reversible"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1, got 0"),
        ({"feedforward_chunk": -1}, "feedforward_chunk must not be negative, got -1"),
        (
            {"feedforward_chunk": 4, "feedforward": None},
            "feedforward_chunk=4 .* and no layer has one; leave it out, or name a feedforward",
        ),
        ({"feedforward_chunk": 4, "feedforward": [None], "encoder_feedforward": [None]}, "no layer has one"),
        ({"loss_chunk": -1}, "loss_chunk must not be negative, got -1"),
        ({"mixr": "local"}, r"unknown keyword 'mixr'; did you mean 'mixer'\? Known: .*, mixer, "),
        ({"window": 129}, "unknown keyword 'window'; known: axial_pos_dropout, "),
        ({"num_label": 3}, r"unknown keyword 'num_label'; did you mean 'num_labels'\?"),
    ],
)
def test_a_bad_field_is_refused_when_the_config_is_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    "layers", [{"feedforward": [None, "mlp"]}, {"feedforward": None, "encoder_feedforward": "mlp"}]
)
def test_feedforwards_are_cut_where_only_some_layers_have_one(layers: dict[str, Any]) -> None:
    assert config(feedforward_chunk=4, **layers).feedforward_chunk == 4


@pytest.mark.parametrize(
    "given",
    [
        {"torch_dtype": "bfloat16", "num_labels": 5, "name_or_path": "here", "_name_or_path": "here"},
        {
            "dtype": torch.float32,
            "architectures": ["SubquadModel"],
            "problem_type": "regression",
            "model_type": "subquad",
        },
        {"attn_implementation": "sdpa", "output_attentions": False, "_attn_implementation_internal": "sdpa"},
        {"temperature": 0.5, "num_beams": 4, "use_cache": False, "max_new_tokens": 7},
        {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}, "quantization_config": None},
    ],
    ids=lambda given: next(iter(given)),
)
def test_keywords_that_are_transformers_own_are_taken(given: dict[str, Any]) -> None:
    assert config(**given).mixer == "full"


def test_a_saved_config_keeps_what_other_tools_wrote_into_it(tmp_path: Path) -> None:
    noted = config(mixer="local")
    noted.use_cache = False
    noted.note = "trained on Sundays"
    assert SubquadConfig.from_dict(noted.to_dict()).note == noted.note
    model = SubquadForSequenceClassification(noted)
    model.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert (again.mixer, again.note) == ("local", noted.note)
    assert SubquadForSequenceClassification.from_pretrained(tmp_path, dtype="auto").config.note == noted.note
    assert AutoConfig.from_pretrained(tmp_path, mixer="full", num_labels=2).mixer == "full"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "fulll"}, "unknown token mixer 'fulll'; did you mean 'full'"),
        ({"mixer": {"name": "local", "windw": 3}}, "local: unknown option 'windw'; did you mean 'window'"),
        ({"mixer": {"window": 3}}, "needs its 'name'"),
        ({"mixer": []}, "mixer is an empty list; name at least one"),
        ({"mixer": ["full", 3]}, "mixer must be a name, a dict with 'name', or a list of these; got 3"),
        ({"feedforward": "mpl"}, "unknown channel mixer 'mpl'; did you mean 'mlp'"),
        ({"mixer": "linformer", "causal": True}, "linformer: causal=True is not supported; mechanisms that support it"),
        ({"mixer": {"name": "local", "window": 4}}, "must be odd; got 4, use 3 or 5"),
        ({"num_attention_heads": 3}, "embed_dim=16 is not divisible by num_heads=3"),
    ],
)
def test_a_bad_layer_is_refused_when_the_model_is_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier(**changes)


@dataclass(frozen=True, kw_only=True)
class WholeBlockConfig(MixerConfig):
    """A mixer that owns its residual."""

    placement: ClassVar[Literal["sublayer", "block"]] = "block"

    @property
    def traits(self) -> Traits:
        return Traits(bidirectional=True, padding=True)

    def build(self, dims: Dims) -> TokenMixer:
        return Full(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        return Cost()


@pytest.fixture
def whole_block() -> Iterator[str]:
    register("whole_block")(WholeBlockConfig)
    yield "whole_block"
    MIXERS.remove("whole_block")


def test_a_block_mixer_refuses_a_feedforward(whole_block: str) -> None:
    with pytest.raises(ValueError, match="whole_block: owns its channel mixing; use feedforward=None with it"):
        classifier(mixer=whole_block, feedforward="mlp")


def test_the_output_of_a_block_mixer_is_used_as_it_is(whole_block: str) -> None:
    model = classifier(mixer=[whole_block, "full"], feedforward=[None, "mlp"], num_hidden_layers=2)
    block, x = model.model.blocks[0], torch.randn(1, 5, 16)
    assert isinstance(block, Block)
    assert block.mixer_norm is None
    torch.testing.assert_close(block(x)[0], block.mixer(x).y)
    assert model(torch.ones(1, 4, dtype=torch.int64)).logits.shape == (1, 3)


def test_dims_of_a_layer() -> None:
    dims = config(global_tokens="first", positions="rotary", bias=False, dropout=0.5).mixer_dims(2, prepended=1)
    expected = make_dims(
        embed_dim=16, num_heads=2, max_length=41, positions="rotary", bias=False, dropout=0.5, layer=2, num_global=1
    )
    assert dims == expected


def test_a_changed_copy_leaves_the_original_as_it_was() -> None:
    original = config(mixer=[{"name": "local", "window": 5}])
    changed = original.with_changes(causal=True)
    assert isinstance(changed.mixer, list)
    changed.mixer[0]["window"] = 7
    assert changed.causal
    assert (original.causal, original.mixer) == (False, [{"name": "local", "window": 5}])


def test_encoder_and_decoder_have_what_is_named_for_them() -> None:
    both = config(
        mixer="ngram",
        feedforward="glu",
        encoder_mixer=["gmlp", "full"],
        encoder_feedforward=[None, "mlp"],
        encoder_layers=2,
        cross_mixer=["full", {"name": "topk", "top_k": 3}],
    )
    encoder, decoder = both.of_encoder(), both.of_decoder()
    assert [mixer.name for mixer in encoder.layer_mixers()] == ["gmlp", "full"]
    assert [None if layer is None else layer.name for layer in encoder.layer_feedforwards()] == [None, "mlp"]
    assert [mixer.name for mixer in decoder.layer_mixers()] == ["ngram"] * 3
    assert [None if layer is None else layer.name for layer in decoder.layer_feedforwards()] == ["glu"] * 3
    assert [mixer.name for mixer in both.layer_cross_mixers()] == ["full", "topk", "full"]
    assert (encoder.causal, decoder.causal) == (False, True)
    same = config(mixer="full")
    assert same.of_encoder().mixer == same.of_decoder().mixer == "full"
    assert same.of_encoder().num_hidden_layers == 3
