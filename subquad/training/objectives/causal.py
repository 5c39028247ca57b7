"""Causal language modelling: each token from those before it, or answers at some positions."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from torch import Tensor

from subquad.costs import Cost
from subquad.labels import IGNORED
from subquad.models.causal_lm import SubquadForCausalLM
from subquad.models.pretrained import SubquadPreTrainedModel
from subquad.tasks.kinds import CausalData
from subquad.tasks.splits import LanguageSplit
from subquad.training.dataset import Example
from subquad.training.objectives.base import Objective
from subquad.training.order import Visit
from subquad.training.scoring import Bounds, Sums, bucket_bounds, sum_up


class CausalObjective(Objective[CausalData, SubquadForCausalLM]):
    """What is said at position t - 1 is scored against the label at t, in a context of t tokens.

    In a stream t counts from where the document begins, or the row that it is read in: all mechanisms are told apart by
    the same t, whether or not they carry a memory of the windows before.
    """

    model_class: ClassVar[type[SubquadPreTrainedModel]] = SubquadForCausalLM
    causal: ClassVar[bool] = True

    def cost(self, model: SubquadForCausalLM) -> Cost:
        """As in `Objective`."""
        return model.model.cost(self.data.max_length)

    def example(self, split: LanguageSplit, visit: Visit) -> Example:
        """As in `Objective`: the tokens, and labels that the model shifts; nothing stands before the first token."""
        start, stop = split.inputs.offsets[visit.example : visit.example + 2]
        tokens = split.inputs[visit.example]
        labels = (tokens if split.labels is None else split.labels[start:stop]).astype(np.int64)
        labels[: 1 if visit.asked else None] = IGNORED
        return {"input_ids": tokens, "labels": labels}

    def sums(self, logits: Tensor, labels: Tensor, before: Tensor, bounds: Bounds) -> Sums:
        """As in `Objective`, by position of the label."""
        return sum_up(self.score, logits[:, :-1], labels[:, 1:], bounds, start=before + 1)

    def bounds(self, longest: int) -> Bounds:
        """As in `Objective`: the number of tokens before the label, in buckets that double."""
        return bucket_bounds(longest)
