"""Masked language modelling: hidden tokens from those on both sides (BERT, arXiv 1810.04805, appendix A.1).

A share of the tokens is chosen; 80 % of them are replaced by the mask token, 10 % by a random token, 10 % stay. Which
and how is a pure function of (seed, example, visit), so that every visit hides others and a resumed run hides the same;
in evaluation it depends on the example alone, the same for every mechanism and seed.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from torch import Tensor

from subquad.costs import Cost
from subquad.labels import IGNORED
from subquad.models.masked_lm import SubquadForMaskedLM
from subquad.models.pretrained import SubquadPreTrainedModel
from subquad.tasks.kinds import MaskedData
from subquad.tasks.splits import LanguageSplit
from subquad.training.dataset import Example
from subquad.training.objectives.base import Objective
from subquad.training.order import Visit
from subquad.training.scoring import Bounds, Sums, sum_up

MASKED, RANDOM = 0.8, 0.1


class MaskedObjective(Objective[MaskedData, SubquadForMaskedLM]):
    """The chosen tokens are scored in their own places."""

    model_class: ClassVar[type[SubquadPreTrainedModel]] = SubquadForMaskedLM
    causal: ClassVar[bool] = False

    def __init__(self, data: MaskedData, *, seed: int) -> None:
        super().__init__(data, seed=seed)
        special = {data.pad_token_id, data.mask_token_id}
        self._ordinary = np.array([token for token in range(data.vocab_size) if token not in special])

    def cost(self, model: SubquadForMaskedLM) -> Cost:
        """As in `Objective`."""
        return model.model.cost(self.data.max_length)

    def example(self, split: LanguageSplit, visit: Visit) -> Example:
        """As in `Objective`: the tokens, some of them hidden, and what was there."""
        in_training = visit.number >= 0
        seeds = (1, self.seed, visit.example, visit.number) if in_training else (0, visit.example)
        generator = np.random.default_rng(seeds)
        tokens = split.inputs[visit.example].astype(np.int64)
        labels = np.full_like(tokens, IGNORED)
        if len(tokens):
            chosen = generator.choice(len(tokens), max(1, round(self.data.mask_share * len(tokens))), replace=False)
            labels[chosen] = tokens[chosen]
            tokens[chosen] = self._hide(tokens[chosen], generator)
        return {"input_ids": tokens, "labels": labels}

    def _hide(self, tokens: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        fate = generator.random(len(tokens))
        other = generator.choice(self._ordinary, len(tokens))
        hidden = np.where(fate < MASKED, self.data.mask_token_id, tokens)
        return np.where((fate >= MASKED) & (fate < MASKED + RANDOM), other, hidden)

    def sums(self, logits: Tensor, labels: Tensor, before: Tensor, bounds: Bounds) -> Sums:
        """As in `Objective`."""
        return sum_up(self.score, logits, labels)
