"""`SubquadForSeq2SeqLM`: encoder and decoder, the decoder with a language head; translates, sums up, copies.

Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3. The encoder may be of any mixer that
reads both sides, the decoder of any causal one, and between them stands any that mixes across two sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from subquad.costs import Cost
from subquad.labels import IGNORED
from subquad.models.backbone import SubquadModel
from subquad.models.block import Block, add_losses, layers_of
from subquad.models.configuration import SubquadConfig
from subquad.models.generation import SubquadGeneratingModel
from subquad.models.language_head import LanguageHead, Prediction


@dataclass
class SubquadSeq2SeqLMOutput(Seq2SeqLMOutput):
    """Output of the encoder-decoder model.

    Attributes:
        loss: cross-entropy and auxiliary losses, if labels were given.
        logits: (B, T, V).
        past_key_values: a `SubquadCache`, if asked for.
        decoder_hidden_states: the decoder's stream between its blocks, if asked for.
        encoder_last_hidden_state: (B, S, D).
        encoder_hidden_states: the encoder's stream between its blocks, if asked for.
        aux_loss: sum of the layers' auxiliary losses, or None.
    """

    aux_loss: Tensor | None = None


class SubquadForSeq2SeqLM(SubquadGeneratingModel):
    """The next token of a target from all before it and the whole source.

    `config.mixer` is the decoder's, `config.encoder_mixer` the encoder's where it is another, `config.cross_mixer` the
    one between. Encoder and decoder share the token vectors.

    Raises:
        ValueError: a mixer that can't do its part, or no token for the decoder to start with.
    """

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__(config.with_changes(is_encoder_decoder=True, decoder_start_token_id=_start_token(config)))
        self.encoder = SubquadModel(config.of_encoder(), add_pooling=False)
        self.decoder = SubquadModel(config.of_decoder(), add_pooling=False, cross_mixers=config.layer_cross_mixers())
        self.lm_head = LanguageHead(config)
        self.tie_to("encoder.embedding.tokens", "decoder.embedding.tokens")
        self.loss_type = "ForMaskedLM"  # cross-entropy without a shift: the decoder's input is shifted instead
        self.generation_config.decoder_start_token_id = self.config.decoder_start_token_id
        self.decide_on_cache()
        self.post_init()

    def decoding_blocks(self) -> Sequence[Block]:
        """The decoder's layers."""
        return layers_of(self.decoder.blocks)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The stack that reads the source."""
        return self.encoder

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table of both stacks."""
        self.encoder.set_input_embeddings(value)
        self.decoder.set_input_embeddings(value)

    def cost(self, source_length: int, target_length: int, *, dtype_bytes: int = 4) -> Cost:
        """Price of all mixers for one pair of source and target, as `SubquadModel.cost` counts it.

        Args:
            source_length: S, tokens that the encoder reads.
            target_length: T, tokens that the decoder reads, the start token included.
            dtype_bytes: of an element of the stream.
        """
        encoder = self.encoder.cost(source_length, dtype_bytes=dtype_bytes)
        return encoder + self.decoder.cost(target_length, context_length=source_length, dtype_bytes=dtype_bytes)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The target one place to the right behind the start token, (B, T); collators call it by this name."""
        assert self.config.decoder_start_token_id is not None
        padding = self.config.pad_token_id
        start = self.config.decoder_start_token_id
        shifted = torch.full_like(labels, start)
        shifted[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, start if padding is None else padding)
        return shifted

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        decoder_segment_ids: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> SubquadSeq2SeqLMOutput:
        """Logits of the target's tokens.

        Args:
            input_ids: int (B, S), the source; or inputs_embeds.
            attention_mask: (B, S), 1 or True for real tokens of the source.
            decoder_input_ids: int (B, T), the target so far, behind the start token; made from the labels when absent.
            decoder_attention_mask: (B, T), 1 or True for real tokens of it; with a cache also (B, past + T).
            labels: int (B, T), the target; -100 where nothing is to be predicted.
            encoder_outputs: what the encoder returned for this source.
            past_key_values: a `SubquadCache` to go on from; left as it is.
            use_cache: return a cache; None for whether one is given.
            segment_ids: int (B, S), non-decreasing; packed pairs of source and target don't mix.
            decoder_segment_ids: int (B, T), the same of the target.
            global_attention_mask: (B, S), 1 or True for global tokens of the source.
            inputs_embeds: (B, S, D) instead of input_ids.
            decoder_inputs_embeds: (B, T, D) instead of decoder_input_ids.
            output_hidden_states: return the streams between blocks.
            logits_to_keep: logits of that many last tokens, 0 for all, or indices of tokens.
            **kwargs: what `Trainer` and `generate` add, such as `num_items_in_batch` for the loss; others are refused.

        Raises:
            ValueError: as `SubquadModel`; labels of another shape or outside the vocabulary.
        """
        self.refuse_foreign(kwargs)
        source = (input_ids, attention_mask, segment_ids, global_attention_mask, inputs_embeds)
        encoded = encoder_outputs or self.encoder(*source, output_hidden_states=output_hidden_states)
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        target = (decoder_input_ids, decoder_attention_mask, decoder_segment_ids, None, decoder_inputs_embeds)
        output = self.decoder(
            *target,
            output_hidden_states=output_hidden_states,
            past_key_values=past_key_values,
            use_cache=use_cache,
            encoder_hidden_states=encoded[0],
            encoder_attention_mask=attention_mask,
            encoder_segment_ids=segment_ids,
        )
        aux_loss = add_losses(getattr(encoded, "aux_loss", None), output.aux_loss)
        predicted = self.predict(output.last_hidden_state, labels, aux_loss, logits_to_keep, **kwargs)
        return _output(predicted, encoded, output, aux_loss)


def _output(
    predicted: Prediction,
    encoded: BaseModelOutput | tuple[Tensor, ...],
    decoded: Any,  # its cache is not of the class that transformers names in the type
    aux_loss: Tensor | None,
) -> SubquadSeq2SeqLMOutput:
    """What the model returns, of the outputs of its halves."""
    return SubquadSeq2SeqLMOutput(
        loss=predicted.loss,
        logits=predicted.logits,
        past_key_values=decoded.past_key_values,
        decoder_hidden_states=decoded.hidden_states,
        encoder_last_hidden_state=encoded[0],
        encoder_hidden_states=getattr(encoded, "hidden_states", None),
        aux_loss=aux_loss,
    )


def _start_token(config: SubquadConfig) -> int:
    candidates = (config.decoder_start_token_id, config.bos_token_id, config.pad_token_id)
    start = next((token for token in candidates if token is not None), None)
    if start is None:
        raise ValueError(
            "SubquadForSeq2SeqLM: the decoder needs a token to start with; set decoder_start_token_id, bos_token_id or "
            "pad_token_id"
        )
    return start
