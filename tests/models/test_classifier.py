"""The classifier: sizes, loss, pooling, masks and options, over every mechanism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import MIXERS, batch, blocks_of, classifier, config, feedforwards_beside, small
from torch import nn

from subquad import receipts
from subquad.build import list_mixers
from subquad.models import SubquadForSequenceClassification, SubquadModel

BY_MIXER = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
BESIDE_FEEDFORWARDS = {name: mixer for name, mixer in MIXERS.items() if any(feedforwards_beside(mixer))}


def test_the_release_listops_model_has_its_published_number_of_parameters() -> None:
    release = config(
        vocab_size=17,
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=1024,
        bias=False,
        num_labels=10,
        max_position_embeddings=2000,
    )
    with torch.device("meta"):
        model = SubquadForSequenceClassification(release)
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_948_746


@BY_MIXER
def test_loss_and_gradients_reach_every_layer(mixer: Any) -> None:
    model, (tokens, attention) = classifier(mixer=mixer).train(), batch()
    output = model(tokens, attention_mask=attention, labels=torch.tensor([0, 1, 2]))
    assert output.logits.shape == (3, 3)
    expected = nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(output.loss, expected if output.aux_loss is None else expected + output.aux_loss)
    output.loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    for layer in range(3):
        assert any(name.startswith(f"model.blocks.{layer}.mixer.") for name in reached)
    assert {"model.embedding.cls", "model.embedding.tokens.weight", "head.classify.weight"} <= reached


@BY_MIXER
def test_padding_changes_no_logit(mixer: Any) -> None:
    model, (tokens, attention) = classifier(mixer=mixer).double(), batch()
    logits = model(tokens, attention_mask=attention).logits
    others = torch.where(attention == 1, tokens, 5)
    assert torch.equal(model(others, attention_mask=attention).logits, logits)
    for row, kept in enumerate(attention.sum(dim=1).tolist()):
        alone = model(tokens[row : row + 1, :kept]).logits
        if not model.config.layer_mixers()[0].padded_structure:
            torch.testing.assert_close(alone[0], logits[row], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pooling", ["cls", "first", "mean", "last"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling_reads_valid_tokens_alone(pooling: str, side: str) -> None:
    model, (tokens, attention) = classifier(pooling=pooling).double(), batch()
    if side == "left":
        tokens, attention = tokens.flip(1), attention.flip(1)
    output = model.model(tokens, attention_mask=attention)
    for row in range(3):
        valid = attention[row].bool()
        states = output.last_hidden_state[row, valid]
        expected = {"first": states[0], "last": states[-1], "mean": states.mean(dim=0)}
        if pooling == "cls":
            assert not torch.isclose(output.pooler_output[row], states).all(dim=-1).any()
        else:
            torch.testing.assert_close(output.pooler_output[row], expected[pooling], rtol=1e-10, atol=1e-10)
        alone = model.model(tokens[row : row + 1, valid]).pooler_output
        torch.testing.assert_close(output.pooler_output[row], alone[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pooling", ["cls", "first", "mean", "last"])
def test_an_example_of_padding_alone_is_finite(pooling: str) -> None:
    model, (tokens, attention) = classifier(pooling=pooling), batch()
    attention[1] = 0
    output = model(tokens, attention_mask=attention, labels=torch.tensor([0, 1, 2]))
    output.loss.backward()
    assert bool(output.logits.isfinite().all())
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_the_learned_vector_is_the_first_token_and_left_out_of_the_hidden_states() -> None:
    model, (tokens, attention) = classifier(), batch()
    output = model.model(tokens, attention_mask=attention, output_hidden_states=True)
    assert output.last_hidden_state.shape == (3, 13, 16)
    assert [states.shape for states in output.hidden_states] == [(3, 14, 16)] * 4
    torch.testing.assert_close(output.hidden_states[-1][:, 0], output.pooler_output)
    torch.testing.assert_close(output.hidden_states[-1][:, 1:], output.last_hidden_state)
    assert not output.last_hidden_state[attention == 0].any()
    plain = SubquadModel(config(), add_pooling=False)
    assert plain.embedding.cls is None
    assert plain(tokens).pooler_output is None


def test_mixers_with_a_fixed_length_have_room_for_the_learned_vector() -> None:
    for name in list_mixers(fixed_length=True, bidirectional=True):
        model = classifier(mixer=small(name))
        model(torch.ones(1, 40, dtype=torch.int64))
        with pytest.raises(ValueError, match="x has length 42 but was built for max_length=41"):
            model(torch.ones(1, 41, dtype=torch.int64))


@pytest.mark.parametrize("name", list_mixers(segments=True, bidirectional=True))
def test_packed_documents_do_not_mix(name: str) -> None:
    model, (tokens, _) = classifier(mixer=small(name), pooling="mean").double(), batch(rows=1)
    segments = torch.tensor([[0] * 5 + [1] * 8])
    packed = model.model(tokens, segment_ids=segments).last_hidden_state
    alone = model.model(tokens[:, 5:]).last_hidden_state
    torch.testing.assert_close(packed[:, 5:], alone, rtol=1e-10, atol=1e-10)


def test_the_learned_vector_belongs_to_the_first_document() -> None:
    model, (tokens, _) = classifier(pooling="cls").double(), batch(rows=1)
    pooled = model.model(tokens, segment_ids=torch.tensor([[4] * 5 + [6] * 8])).pooler_output
    torch.testing.assert_close(pooled, model.model(tokens[:, :5]).pooler_output, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "axial", "rotary", "none"])
def test_positions_begin_anew_after_padding_on_the_left(positions: str) -> None:
    model, (tokens, _) = classifier(positions=positions, pooling="mean").double(), batch(rows=1)
    attention = torch.ones(1, 13, dtype=torch.int64)
    attention[:, :4] = 0
    padded = model(tokens, attention_mask=attention).logits
    torch.testing.assert_close(padded, model(tokens[:, 4:]).logits, rtol=1e-10, atol=1e-10)
    shuffled = torch.cat((tokens[:, 1:], tokens[:, :1]), dim=1)
    same = torch.allclose(model(shuffled).logits, model(tokens).logits)
    assert same == (positions == "none")


@pytest.mark.parametrize("name", list_mixers(global_tokens=True, bidirectional=True))
def test_the_first_token_can_be_global(name: str) -> None:
    narrow = classifier(mixer=small(name), num_hidden_layers=1).double()
    wide = classifier(mixer=small(name), num_hidden_layers=1, global_tokens="first").double()
    wide.load_state_dict(narrow.state_dict())
    (tokens, attention), reach = batch(rows=2), {}
    for model in (narrow, wide):
        vectors = model.get_input_embeddings()(tokens).detach().requires_grad_()
        model(inputs_embeds=vectors, attention_mask=attention).logits.sum().backward()
        assert vectors.grad is not None
        reach[model] = vectors.grad.abs().amax(dim=-1) > 0
    assert int(reach[narrow].sum()) < int(attention.sum())
    assert torch.equal(reach[wide], attention.bool())
    asked = torch.zeros_like(tokens)
    asked[:, 3] = 1
    more = wide.model(tokens, attention_mask=attention, global_attention_mask=asked).last_hidden_state
    assert not torch.allclose(more, wide.model(tokens, attention_mask=attention).last_hidden_state)


def test_global_tokens_leave_a_receipt_where_they_are_ignored() -> None:
    model, (tokens, _) = classifier(mixer=small("local"), global_tokens="first"), batch()
    with receipts() as collected:
        model(tokens)
    ignored = [receipt for receipt in collected.entries if receipt.asked == "global_tokens"]
    assert [(receipt.where, receipt.count) for receipt in ignored] == [("local", 3)]


@pytest.mark.parametrize("mixer", BESIDE_FEEDFORWARDS.values(), ids=BESIDE_FEEDFORWARDS)
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_a_chunked_feedforward_gives_the_same(mixer: Any, chunk: int) -> None:
    whole, chunked = (classifier(mixer=mixer, feedforward_chunk=size).double() for size in (0, chunk))
    tokens, attention = batch()
    expected = whole(tokens, attention_mask=attention).logits
    torch.testing.assert_close(chunked(tokens, attention_mask=attention).logits, expected, rtol=1e-10, atol=1e-10)


@BY_MIXER
def test_gradient_checkpointing_gives_the_same_gradients(mixer: Any) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = classifier(mixer=mixer).double().train()
        if checkpointed:
            model.activation_checkpointing_enable()
            assert all(block.gradient_checkpointing for block in model.model.blocks)
        tokens, attention = batch()
        model(tokens, attention_mask=attention, labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-10, atol=1e-10)


@BY_MIXER
@torch.no_grad()
def test_bfloat16_stays_close_to_float32(mixer: Any) -> None:
    model, (tokens, attention) = classifier(mixer=mixer), batch()
    exact = model(tokens, attention_mask=attention).logits
    narrow = model.bfloat16()(tokens, attention_mask=attention).logits
    rounded = model.float()(tokens, attention_mask=attention).logits  # float32 with the same rounded parameters
    assert narrow.dtype == torch.bfloat16
    unavoidable = float((rounded - exact).norm() / exact.norm())
    assert float((narrow.float() - exact).norm() / exact.norm()) < max(0.1, 2 * unavoidable)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_norms_stand_before_or_after_the_sublayers(norm: str) -> None:
    model = classifier(norm=norm, num_hidden_layers=1, positions="none")
    (block,), x = blocks_of(model.model), torch.randn(2, 5, 16)
    assert block.mixer_norm is not None
    assert block.feedforward is not None
    assert block.feedforward_norm is not None
    y = block(x).x
    if norm == "pre":
        expected = x + block.mixer(block.mixer_norm(x)).y
        expected = expected + block.feedforward(block.feedforward_norm(expected)).y
    else:
        expected = block.mixer_norm(x + block.mixer(x).y)
        expected = block.feedforward_norm(expected + block.feedforward(expected).y)
    torch.testing.assert_close(y, expected)
    assert isinstance(model.model.final_norm, nn.LayerNorm if norm == "pre" else nn.Identity)


@pytest.mark.parametrize("name", list_mixers(causal=True))
def test_a_causal_model_sees_no_future_token(name: str) -> None:
    model = classifier(mixer=small(name), causal=True, pooling="mean").double()
    tokens, _ = batch(rows=1)
    other = torch.cat((tokens[:, :7], tokens[:, 7:] % 10 + 1), dim=1)
    states, changed = (model.model(ids).last_hidden_state for ids in (tokens, other))
    # Tokens that are sorted into clusters are added up in an order that later tokens change: rounding, and no more.
    torch.testing.assert_close(states[:, :7], changed[:, :7], rtol=1e-12, atol=1e-12)
    assert not torch.equal(states[:, 7:], changed[:, 7:])


def test_the_price_of_the_stack_is_that_of_its_layers() -> None:
    model = classifier(mixer=[small("full"), small("local")])
    layers = [module for block in blocks_of(model.model) for module in (block.mixer, block.feedforward)]
    counted = sum(p.numel() for module in layers if module is not None for p in module.parameters())
    price = model.model.cost(20)
    assert price.parameters == counted
    dims = model.config.mixer_dims(0, prepended=1)
    mixers = sum(mixer.cost(dims, 21, 4).flops for mixer in model.config.layer_mixers())
    assert price.flops == mixers + 3 * 4 * 21 * 16 * 24


def test_inputs_are_tokens_or_vectors() -> None:
    model, (tokens, _) = classifier(), batch()
    vectors = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(model(inputs_embeds=vectors).logits, model(tokens).logits)
    for inputs, got in (({}, "neither"), ({"input_ids": tokens, "inputs_embeds": vectors}, "both")):
        with pytest.raises(ValueError, match=f"pass exactly one of input_ids and inputs_embeds, got {got}"):
            model(**inputs)


@pytest.mark.parametrize("field", ["attention_mask", "segment_ids", "global_attention_mask"])
def test_a_mask_of_another_shape_is_refused(field: str) -> None:
    model, (tokens, _) = classifier(), batch()
    with pytest.raises(ValueError, match=rf"{field} must have shape \(B, L\) = \(3, 13\), got \(3, 12\)"):
        model(tokens, **{field: torch.ones(3, 12, dtype=torch.int64)})


def test_learned_positions_end_where_the_config_says() -> None:
    model = classifier(positions="learned")
    model(torch.ones(1, 40, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"reaches 41 tokens, but .* max_position_embeddings=40; raise it"):
        model(torch.ones(1, 41, dtype=torch.int64))


def test_tokens_embeddings_can_be_replaced() -> None:
    model, table = classifier(), nn.Embedding(7, 16)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table
