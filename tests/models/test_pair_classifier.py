"""The classifier of pairs: two towers of the same weights, and the head of Long Range Arena's Retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import MIXERS, batch, build, config
from torch import nn

from subquad.models import SubquadForPairClassification

BY_MIXER = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
LABELS = torch.tensor([0, 1, 2])


def pair() -> dict[str, torch.Tensor]:
    (first, attention), second = batch(), batch(length=9)
    return {
        "input_ids": first,
        "attention_mask": attention,
        "pair_input_ids": second[0],
        "pair_attention_mask": second[1],
    }


@pytest.mark.parametrize(("features", "count"), [("concat", 1_087_618), ("interaction", 1_218_690)])
def test_the_retrieval_models_have_their_published_numbers_of_parameters(features: str, count: int) -> None:
    released = config(
        vocab_size=257,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        bias=False,
        num_labels=2,
        max_position_embeddings=4000,
        pooling="first",
        pair_features=features,
    )
    with torch.device("meta"):
        model = SubquadForPairClassification(released)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@BY_MIXER
def test_loss_and_gradients_reach_every_layer(mixer: Any) -> None:
    model = build(SubquadForPairClassification, mixer=mixer).train()
    output = model(**pair(), labels=LABELS)
    assert output.logits.shape == (3, 3)
    expected = nn.functional.cross_entropy(output.logits, LABELS)
    torch.testing.assert_close(output.loss, expected if output.aux_loss is None else expected + output.aux_loss)
    output.loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(any(name.startswith(f"model.blocks.{layer}.mixer.") for name in reached) for layer in range(3))


@pytest.mark.parametrize("features", ["interaction", "concat"])
def test_the_head_reads_both_vectors_their_product_and_their_difference(features: str) -> None:
    model, given = build(SubquadForPairClassification, pair_features=features).double(), pair()
    first = model.model(given["input_ids"], given["attention_mask"]).pooler_output
    second = model.model(given["pair_input_ids"], given["pair_attention_mask"]).pooler_output
    parts = [first, second, first * second, first - second][: 4 if features == "interaction" else 2]
    hidden = model.head.expand(torch.cat(parts, dim=-1)).relu()
    expected = model.head.classify(model.head.narrow(hidden).relu())
    torch.testing.assert_close(model(**given).logits, expected, rtol=1e-10, atol=1e-10)


def test_the_towers_share_their_weights_and_see_nothing_of_each_other() -> None:
    model, given = build(SubquadForPairClassification).double(), pair()
    swapped = dict(zip(given, [*list(given.values())[2:], *list(given.values())[:2]], strict=True))
    assert not torch.allclose(model(**given).logits, model(**swapped).logits)
    same = {"input_ids": given["input_ids"], "pair_input_ids": given["input_ids"]}
    features: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda _module, vectors: features.extend(vectors))
    model(**same)
    assert torch.equal(features[0], features[1])


@pytest.mark.parametrize("packed", ["segment_ids", "pair_segment_ids"])
def test_packed_documents_of_either_sequence_do_not_mix(packed: str) -> None:
    model, given = build(SubquadForPairClassification, pooling="first").double(), pair()
    tokens = "input_ids" if packed == "segment_ids" else "pair_input_ids"
    segments = (torch.arange(given[tokens].shape[1]) >= 2).long().expand(3, -1)
    changed = given[tokens].where(segments == 0, given[tokens] % 10 + 1)
    assert not torch.allclose(model(**given | {tokens: changed}).logits, model(**given).logits)
    mixed = model(**given | {tokens: changed, packed: segments}).logits
    torch.testing.assert_close(mixed, model(**given, **{packed: segments}).logits, rtol=1e-10, atol=1e-10)


def test_the_stream_between_blocks_is_asked_of_each_stack() -> None:
    with pytest.raises(ValueError, match="output_hidden_states is not supported; two sequences"):
        build(SubquadForPairClassification)(**pair(), output_hidden_states=True)


@BY_MIXER
def test_a_loaded_model_gives_the_same_logits(mixer: Any, tmp_path: Path) -> None:
    model = build(SubquadForPairClassification, mixer=mixer)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)  # nothing may be drawn anew
    loaded = SubquadForPairClassification.from_pretrained(tmp_path).eval()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    # Loaded tensors lie elsewhere in memory, and products of matrices round by how they are aligned.
    torch.testing.assert_close(loaded(**pair()).logits, model(**pair()).logits, rtol=1e-5, atol=1e-5)


def test_unknown_features_are_refused() -> None:
    with pytest.raises(ValueError, match="pair_features='nli' is not supported"):
        config(pair_features="nli")
