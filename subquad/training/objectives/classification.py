"""Classification: one label for a sequence, from a pooled vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from subquad.costs import Cost
from subquad.interface import MixerConfig
from subquad.models.classifier import SubquadForSequenceClassification
from subquad.models.configuration import SubquadConfig
from subquad.models.pretrained import SubquadPreTrainedModel
from subquad.tasks.kinds import ClassificationData
from subquad.tasks.splits import LabelledSplit
from subquad.training.dataset import Example
from subquad.training.objectives.base import Objective
from subquad.training.order import Visit
from subquad.training.scoring import Bounds, Sums, sum_up


class ClassificationObjective(Objective[ClassificationData, SubquadForSequenceClassification]):
    """Right labels. A mechanism that only sees the past classifies by the mean over its positions."""

    model_class: ClassVar[type[SubquadPreTrainedModel]] = SubquadForSequenceClassification
    causal: ClassVar[bool] = False

    @classmethod
    def model_settings(cls, sizes: Mapping[str, Any], mixer: MixerConfig) -> dict[str, Any]:
        """As in `Objective`; causal only where the mechanism has no other form."""
        settings = super().model_settings(sizes, mixer)
        if not mixer.traits.bidirectional:
            settings |= {"causal": True, "pooling": "mean"}  # a causal model's first position has seen nothing
        return settings

    def config(self, settings: Mapping[str, Any], mixer: MixerConfig) -> SubquadConfig:
        """As in `Objective`."""
        config = super().config(settings, mixer)
        config.num_labels = self.data.num_labels
        return config

    def cost(self, model: SubquadForSequenceClassification) -> Cost:
        """As in `Objective`."""
        return model.model.cost(self.data.max_length)

    def example(self, split: LabelledSplit, visit: Visit) -> Example:
        """As in `Objective`: the tokens and the label."""
        return {"input_ids": split.inputs[visit.example], "labels": np.asarray(split.labels[visit.example])}

    def sums(self, logits: Tensor, labels: Tensor, before: Tensor, bounds: Bounds) -> Sums:
        """As in `Objective`: one question an example."""
        return sum_up(self.score, logits[:, None], labels[:, None])
