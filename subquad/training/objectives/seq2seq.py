"""Sequence to sequence: a target from a source, the decoder reading the true target so far (teacher forcing)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from subquad.costs import Cost
from subquad.interface import MixerConfig
from subquad.models.configuration import SubquadConfig
from subquad.models.pretrained import SubquadPreTrainedModel
from subquad.models.seq2seq_lm import SubquadForSeq2SeqLM
from subquad.records.conventions import DENSE
from subquad.tasks.kinds import Seq2SeqData
from subquad.tasks.splits import PairedSplit
from subquad.training.dataset import Example
from subquad.training.objectives.base import Objective
from subquad.training.order import Visit
from subquad.training.scoring import Bounds, Sums, sum_up


class Seq2SeqObjective(Objective[Seq2SeqData, SubquadForSeq2SeqLM]):
    """Target tokens, the end token included. The mixer compared is the decoder's; encoder and cross mixer are dense."""

    model_class: ClassVar[type[SubquadPreTrainedModel]] = SubquadForSeq2SeqLM
    causal: ClassVar[bool] = True
    smooths_labels: ClassVar[bool] = True

    @classmethod
    def model_settings(cls, sizes: Mapping[str, Any], mixer: MixerConfig) -> dict[str, Any]:
        """As in `Objective`, with the mixers of the encoder and between encoder and decoder."""
        settings = super().model_settings(sizes, mixer) | {"encoder_mixer": DENSE, "cross_mixer": DENSE}
        if mixer.placement == "block":
            settings["encoder_feedforward"] = "mlp"  # the decoder has none, since its mixer owns the channels too
        return settings

    def config(self, settings: Mapping[str, Any], mixer: MixerConfig) -> SubquadConfig:
        """As in `Objective`."""
        tokens = {"decoder_start_token_id": self.data.start_token_id, "eos_token_id": self.data.end_token_id}
        return super().config({**settings, **tokens}, mixer)

    def cost(self, model: SubquadForSeq2SeqLM) -> Cost:
        """As in `Objective`, of source and target of full length each."""
        return model.cost(self.data.max_length, self.data.max_length)

    def example(self, split: PairedSplit, visit: Visit) -> Example:
        """As in `Objective`: the source, the target behind the start token, the target before the end token."""
        target = split.targets[visit.example].astype(np.int64)
        return {
            "input_ids": split.inputs[visit.example],
            "decoder_input_ids": np.concatenate(([self.data.start_token_id], target)),
            "labels": np.concatenate((target, [self.data.end_token_id])),
        }

    def sums(self, logits: Tensor, labels: Tensor, before: Tensor, bounds: Bounds) -> Sums:
        """As in `Objective`."""
        return sum_up(self.score, logits, labels)
