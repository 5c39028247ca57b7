"""Encoder and decoder: what each may see, the loss, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import (
    CAUSAL,
    CROSS,
    ENCODERS,
    batch,
    blocks_of,
    build,
    decoder_of,
    encoder_of,
    seq2seq_lm,
    small,
    target,
)
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from subquad.benchmark.memory import saved_bytes
from subquad.build import list_mixers
from subquad.interface import Mixed
from subquad.models import SubquadForSeq2SeqLM, reversible


@pytest.mark.parametrize("name", CAUSAL)
def test_the_decoder_sees_no_later_token_and_all_of_the_source(name: str) -> None:
    model, (source, _), before = decoder_of(name), batch(), target()
    after = torch.cat((before[:, :4], before[:, 4:] % 10 + 1), dim=1)
    first, second = (model(source, decoder_input_ids=tokens).logits for tokens in (before, after))
    torch.testing.assert_close(first[:, :4], second[:, :4], rtol=1e-12, atol=1e-12)
    assert not torch.equal(first[:, 4:], second[:, 4:])
    vectors = model.get_input_embeddings()(source).detach().requires_grad_()
    model(inputs_embeds=vectors, decoder_input_ids=before).logits[:, 0].sum().backward()
    assert vectors.grad is not None
    assert bool((vectors.grad.abs().amax(dim=-1) > 0).all())


@pytest.mark.parametrize("mixer", ENCODERS)
def test_padding_of_the_source_changes_no_logit(mixer: str) -> None:
    model, (source, attention), tokens = encoder_of(mixer), batch(), target()
    logits = model(source, attention, decoder_input_ids=tokens).logits
    others = torch.where(attention == 1, source, 5)
    assert torch.equal(model(others, attention, decoder_input_ids=tokens).logits, logits)
    if model.encoder.config.layer_mixers()[0].padded_structure:
        return  # what is laid over the padded length differs
    for row, kept in enumerate(attention.sum(dim=1).tolist()):
        alone = model(source[row : row + 1, :kept], decoder_input_ids=tokens[row : row + 1]).logits
        torch.testing.assert_close(alone[0], logits[row], rtol=1e-9, atol=1e-9)


def test_the_loss_compares_the_target_with_what_was_told_of_it() -> None:
    model, (source, attention), labels = seq2seq_lm(decoder_start_token_id=9), batch(), target()
    labels[1, 4:] = -100
    output = model(source, attention, labels=labels)
    told = torch.cat((torch.full((3, 1), 9), labels[:, :-1].masked_fill(labels[:, :-1] == -100, 0)), dim=1)
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), told)
    assert torch.equal(model(source, attention, decoder_input_ids=told).logits, output.logits)
    expected = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected.float())
    part = model(source, attention, labels=labels, num_items_in_batch=2 * int((labels != -100).sum()))
    torch.testing.assert_close(part.loss, expected.float() / 2)


def test_what_layers_of_both_stacks_add_to_the_loss_is_in_the_loss() -> None:
    switch = {"name": "switch", "experts": 2, "hidden_dim": 8}
    model = seq2seq_lm(feedforward=switch, num_hidden_layers=1, encoder_layers=1).train()
    (source, attention), labels = batch(), target()
    added: list[Tensor] = []

    def note(_module: nn.Module, _inputs: Any, mixed: Mixed) -> None:
        assert mixed.aux_loss is not None
        added.append(mixed.aux_loss)

    for stack in (model.encoder, model.decoder):
        feedforward = blocks_of(stack)[0].feedforward
        assert feedforward is not None
        feedforward.register_forward_hook(note)
    output = model(source, attention, labels=labels)
    torch.testing.assert_close(output.aux_loss, torch.stack(added).sum())
    cross_entropy = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten()).float()
    torch.testing.assert_close(output.loss, cross_entropy + output.aux_loss)


@pytest.mark.parametrize("tie", [True, False])
def test_one_matrix_serves_both_stacks_and_where_the_config_says_so_the_head(tie: bool, tmp_path: Path) -> None:
    build(SubquadForSeq2SeqLM, tie_word_embeddings=tie).save_pretrained(tmp_path)
    model = SubquadForSeq2SeqLM.from_pretrained(tmp_path)
    weight = model.encoder.embedding.tokens.weight
    assert model.decoder.embedding.tokens.weight is weight
    assert (model.lm_head.project.weight is weight) == tie
    model.resize_token_embeddings(15)
    assert model.decoder.embedding.tokens.weight is model.encoder.embedding.tokens.weight
    assert model(torch.tensor([[14]]), decoder_input_ids=torch.tensor([[14]])).logits.shape == (1, 1, 15)


def test_an_encoder_of_another_mixer_and_depth() -> None:
    model = seq2seq_lm(mixer={"name": "ngram", "n": 4}, encoder_mixer="full", encoder_layers=1, num_hidden_layers=2)
    assert [block.mixer.config.name for block in blocks_of(model.encoder)] == ["full"]
    assert [block.mixer.config.name for block in blocks_of(model.decoder)] == ["ngram", "ngram"]
    assert not any(block.mixer.dims.causal for block in blocks_of(model.encoder))
    assert model.config.is_encoder_decoder


@pytest.mark.parametrize("name", list_mixers(bidirectional=False))
def test_a_mixer_that_sees_the_past_only_cannot_encode(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: sees the past only, .*choose encoder_mixer among aft, "):
        seq2seq_lm(mixer=small(name))


@pytest.mark.parametrize("name", list_mixers(causal=False))
def test_a_mixer_without_causal_form_cannot_decode(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: has no causal form, .*choose mixer, the decoder's, among aft, "):
        seq2seq_lm(mixer=small(name))


def test_a_mixer_that_reads_one_sequence_cannot_stand_between() -> None:
    with pytest.raises(ValueError, match="local: cross=True is not supported; mechanisms that support it: cosformer, "):
        seq2seq_lm(cross_mixer="local")


def test_a_decoder_without_a_first_token_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a token to start with; set decoder_start_token_id, bos_token_id or"):
        seq2seq_lm(pad_token_id=None)
    assert seq2seq_lm(bos_token_id=4).config.decoder_start_token_id == 4
    assert seq2seq_lm().config.decoder_start_token_id == 0


@pytest.mark.parametrize("mixer", ["full", "linear"])
def test_gradient_checkpointing_gives_the_same_gradients(mixer: str) -> None:
    gradients, (source, attention), labels = [], batch(), target()
    for checkpointed in (False, True):
        model = seq2seq_lm(mixer=mixer).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        model(source, attention, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-8)


def test_what_the_encoder_has_found_can_be_given() -> None:
    model, (source, attention), tokens = seq2seq_lm(), batch(), target()
    expected = model(source, attention, decoder_input_ids=tokens, output_hidden_states=True)
    assert len(expected.encoder_hidden_states) == len(expected.decoder_hidden_states) == 4
    found = expected.encoder_last_hidden_state
    for given in (BaseModelOutput(last_hidden_state=found), (found,)):
        output = model(None, attention, decoder_input_ids=tokens, encoder_outputs=given)
        assert torch.equal(output.logits, expected.logits)


@pytest.mark.parametrize("name", CROSS)
def test_reversible_layers_give_the_gradients_of_plain_autograd(name: str) -> None:
    gradients, (source, attention), labels = [], batch(), target()
    for couple in (reversible.couple_reversibly, reversible.couple):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reversible, "couple_reversibly", couple)
            model = seq2seq_lm(cross_mixer=small(name), residual="reversible", dropout=0.3).train()
            torch.manual_seed(1)
            model(source, attention, labels=labels).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    assert bool(gradients[0]["encoder.blocks.0.mixer.project_query.weight"].any())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", list_mixers(cross=True, segments=True))
def test_packed_pairs_do_not_mix(name: str) -> None:
    model, (source, _), tokens = seq2seq_lm(cross_mixer=small(name)), batch(), target()
    of_source, of_target = (torch.tensor([[0] * 5 + [1] * rest]).expand(3, -1) for rest in (8, 2))
    packed = model(source, segment_ids=of_source, decoder_input_ids=tokens, decoder_segment_ids=of_target).logits
    for part, of_part in ((slice(0, 5), slice(0, 5)), (slice(5, None), slice(5, None))):
        alone = model(source[:, part], decoder_input_ids=tokens[:, of_part]).logits
        torch.testing.assert_close(packed[:, of_part], alone, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="segments of queries and context go together"):
        model(source, segment_ids=of_source, decoder_input_ids=tokens)


def test_a_stack_without_cross_mixers_has_no_use_for_a_source_and_one_with_them_needs_it() -> None:
    model, (source, _) = seq2seq_lm(), batch()
    with pytest.raises(ValueError, match="got encoder_hidden_states, but this stack has no cross mixers"):
        model.encoder(source, encoder_hidden_states=torch.zeros(3, 13, 16))
    with pytest.raises(ValueError, match="full: was built with cross=True and needs context"):
        model.decoder(source)
    with pytest.raises(ValueError, match="the price of a decoder depends on its source too; pass context_length"):
        model.decoder.cost(20)
    with pytest.raises(ValueError, match="no cross mixers to read a context; leave out context_length"):
        model.encoder.cost(20, context_length=13)


def test_the_price_is_that_of_every_mixer_of_both_halves() -> None:
    model = seq2seq_lm(cross_mixer=[small("full"), small("linear")], encoder_layers=2)
    blocks = blocks_of(model.encoder) + blocks_of(model.decoder)
    layers = [layer for block in blocks for layer in (block.mixer, block.cross_mixer, block.feedforward)]
    price = model.cost(13, 7)
    assert price.parameters == sum(p.numel() for layer in layers if layer is not None for p in layer.parameters())
    cross = [block.cross_mixer for block in blocks_of(model.decoder)]
    read = sum(
        mixer.config.cost(replace(mixer.dims, context_length=13), 7, 4).flops for mixer in cross if mixer is not None
    )
    own = sum(block.mixer.config.cost(block.mixer.dims, 7, 4).flops for block in blocks_of(model.decoder))
    assert price.flops == model.encoder.cost(13).flops + own + read + 3 * 4 * 7 * 16 * 24


@pytest.mark.parametrize("name", CROSS)
def test_the_bytes_that_a_longer_source_costs_a_decoder_are_those_that_autograd_saves(name: str) -> None:
    decoder = seq2seq_lm(cross_mixer=small(name)).decoder.train()
    saved, priced = [], []
    for length in (10, 13):
        source = torch.randn(1, length, 16, dtype=torch.float64, requires_grad=True)
        inputs = {"input_ids": target()[:1], "encoder_hidden_states": source}
        saved.append(saved_bytes(lambda inputs=inputs: decoder(**inputs).last_hidden_state, decoder.parameters()))
        priced.append(decoder.cost(target().shape[1], context_length=length, dtype_bytes=8).activation_bytes)
    assert saved[1] - saved[0] == priced[1] - priced[0]


def test_what_cross_mixers_share_serves_all_layers(tmp_path: Path) -> None:
    linformer = small("linformer") | {"sharing": "layerwise"}
    build(SubquadForSeq2SeqLM, cross_mixer=linformer, encoder_mixer=linformer).save_pretrained(tmp_path)
    model = SubquadForSeq2SeqLM.from_pretrained(tmp_path)
    cross = [block.cross_mixer for block in blocks_of(model.decoder)]
    own = [block.mixer for block in blocks_of(model.encoder)]
    (name,) = own[0].shared_parameters()
    assert len({id(mixer.get_parameter(name)) for mixer in cross if mixer is not None}) == 1
    assert len({id(mixer.get_parameter(name)) for mixer in own}) == 1
    assert cross[0] is not None
    assert cross[0].get_parameter(name) is not own[0].get_parameter(name)
