"""A saved model loaded again gives the same logits, by its class and by the Auto classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import MIXERS, batch, blocks_of, classifier, config, small
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from subquad.mechanisms.linformer import Linformer
from subquad.models import SubquadConfig, SubquadForSequenceClassification, SubquadModel


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_a_loaded_model_gives_the_same_logits(mixer: Any, tmp_path: Path) -> None:
    model, (tokens, attention) = classifier(mixer=mixer), batch()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)  # nothing may be drawn anew
    loaded = SubquadForSequenceClassification.from_pretrained(tmp_path).eval()
    expected = model(tokens, attention_mask=attention).logits
    assert torch.equal(loaded(tokens, attention_mask=attention).logits, expected)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded.config.layer_mixers() == model.config.layer_mixers()


def test_a_loaded_model_draws_the_same_random_blocks(tmp_path: Path) -> None:
    mixer = {"name": "bigbird", "block": 2, "num_random": 2}
    tokens = torch.arange(38)[None] % 10 + 1
    model = classifier(mixer=mixer | {"seed": 5}, max_position_embeddings=40)
    model.save_pretrained(tmp_path)
    loaded = SubquadForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=1e-6)
    other = classifier(mixer=mixer | {"seed": 6}, max_position_embeddings=40)
    other.load_state_dict(model.state_dict())
    assert (other(tokens).logits - model(tokens).logits).abs().max() > 1e-3, "the blocks must matter"


def test_centroids_are_saved_and_loaded_wide_in_a_model_of_bfloat16(tmp_path: Path) -> None:
    model, (tokens, _) = classifier(mixer=small("routing")).bfloat16().train(), batch()
    model(tokens)
    model.save_pretrained(tmp_path)
    loaded = SubquadForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    centroids = dict(model.named_buffers())
    assert {tensor.dtype for tensor in centroids.values()} == {torch.float32}
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(dict(loaded.named_buffers()), centroids, rtol=0, atol=0)


@pytest.mark.parametrize("changes", [{"positions": "learned"}, {"positions": "rotary"}, {"pooling": "mean"}])
def test_other_embeddings_and_poolings_load_too(changes: dict[str, Any], tmp_path: Path) -> None:
    model, (tokens, attention) = classifier(**changes), batch()
    model.save_pretrained(tmp_path)
    loaded = SubquadForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens, attention).logits, model(tokens, attention).logits)


def test_the_auto_classes_know_the_models(tmp_path: Path) -> None:
    model, (tokens, _) = classifier(), batch()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SubquadConfig)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, SubquadForSequenceClassification)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    stack = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(stack, SubquadModel)
    assert torch.equal(stack(tokens).pooler_output, model.model(tokens).pooler_output)


def compressions(model: SubquadModel) -> list[Tensor]:
    mixers = [block.mixer for block in blocks_of(model)]
    return [mixer.compress_key for mixer in mixers if isinstance(mixer, Linformer) and mixer.compress_key is not None]


def test_one_compression_serves_all_layers_before_and_after_loading(tmp_path: Path) -> None:
    model = classifier(mixer=small("linformer") | {"sharing": "layerwise"})
    model.save_pretrained(tmp_path)
    loaded = SubquadForSequenceClassification.from_pretrained(tmp_path).eval()
    for stack in (model.model, loaded.model):
        first, *others = compressions(stack)
        assert len(others) == 2
        assert all(other is first for other in others)
        parameters = {id(p): p.numel() for n, p in stack.blocks.named_parameters() if "norm" not in n}
        assert stack.cost(10).parameters == sum(parameters.values())
    tokens, attention = batch()
    assert torch.equal(loaded(tokens, attention).logits, model(tokens, attention).logits)
    loaded.train()(tokens, attention, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert compressions(loaded.model)[0].grad is not None


def test_layers_of_other_configs_share_nothing() -> None:
    layers = [small("linformer") | {"sharing": "layerwise", "rank": rank} for rank in (3, 5)]
    matrices = compressions(classifier(mixer=layers, num_hidden_layers=4).model)
    assert matrices[2] is matrices[0]
    assert matrices[3] is matrices[1]
    assert matrices[0] is not matrices[1]


def test_a_fresh_model_is_initialised_as_documented() -> None:
    torch.manual_seed(0)
    fresh = SubquadForSequenceClassification(config(mixer=small("linformer"), hidden_size=64))
    embedding = fresh.model.embedding
    assert embedding.cls is not None
    assert not embedding.cls.any()
    assert float(embedding.tokens.weight.detach().std()) == pytest.approx(1.0, abs=0.1)
    for name, parameter in fresh.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        if "norm.weight" in name:
            assert bool((parameter == 1).all())
    assert float(compressions(fresh.model)[0].detach().std()) == pytest.approx(41**-0.5, rel=0.1)
    mixer = blocks_of(fresh.model)[0].mixer
    assert isinstance(mixer, Linformer)
    weight, bound = mixer.project_query.weight.detach(), (6 / (64 + 64)) ** 0.5
    assert float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_nothing_but_safetensors_and_json_is_written(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
