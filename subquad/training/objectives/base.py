"""An objective: everything about training that depends on what is learned, so that the trainer needn't know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from subquad.costs import Cost
from subquad.interface import MixerConfig
from subquad.labels import IGNORED
from subquad.models.configuration import SubquadConfig
from subquad.models.pretrained import SubquadPreTrainedModel
from subquad.records.metrics import MetricKind, metric_kind
from subquad.tasks.base import TaskData
from subquad.training.dataset import Collator, Example
from subquad.training.order import Visit
from subquad.training.scoring import Bounds, Sums, score_of

DataT = TypeVar("DataT", bound=TaskData[Any])
ModelT = TypeVar("ModelT", bound=SubquadPreTrainedModel)


class Objective(ABC, Generic[DataT, ModelT]):
    """What to train and how to score it.

    Args:
        data: the task's.
        seed: of what is drawn anew at every visit of an example.
    """

    model_class: ClassVar[type[SubquadPreTrainedModel]]
    causal: ClassVar[bool]
    """Whether mixers have to see the past only, whatever else they can do."""
    smooths_labels: ClassVar[bool] = False
    """Whether its training loss can have smoothed labels."""

    def __init__(self, data: DataT, *, seed: int) -> None:
        self.data = data
        self.seed = seed

    @property
    def kind(self) -> MetricKind:
        """The metric of the task."""
        return metric_kind(self.data.metric)

    @classmethod
    def model_settings(cls, sizes: Mapping[str, Any], mixer: MixerConfig) -> dict[str, Any]:
        """The model with this mixer, the mixer itself aside, as `SubquadConfig` and records take it."""
        settings = {**sizes, "causal": cls.causal}
        if mixer.placement == "block":
            settings["feedforward"] = None
        return settings

    def config(self, settings: Mapping[str, Any], mixer: MixerConfig) -> SubquadConfig:
        """The config of the model.

        Raises:
            ValueError: a mixer that can't do this.
        """
        return SubquadConfig(
            vocab_size=self.data.vocab_size,
            byte_ids=self.data.byte_ids,
            pad_token_id=self.data.pad_token_id,
            max_position_embeddings=self.data.max_length,
            mixer=mixer.to_dict(),
            **settings,
        )

    def build(self, settings: Mapping[str, Any], mixer: MixerConfig) -> ModelT:
        """The model, freshly initialised.

        Raises:
            ValueError: a mixer that can't do this.
        """
        return self.model_class(self.config(settings, mixer))  # pyright: ignore[reportReturnType] - ModelT is model_class

    def load(self, directory: Path) -> ModelT:
        """The model that was saved in a folder."""
        return self.model_class.from_pretrained(directory)  # pyright: ignore[reportReturnType] - ModelT is model_class

    @abstractmethod
    def cost(self, model: ModelT) -> Cost:
        """Price of the model's mixers for one example of full length."""

    @property
    def collator(self) -> Collator:
        """Makes examples a batch."""
        pad = self.data.pad_token_id
        return Collator({"input_ids": pad, "decoder_input_ids": pad, "labels": IGNORED})

    @abstractmethod
    def example(self, split: Any, visit: Visit) -> Example:
        """One example of one of the data's splits, as the model is called with it."""

    @abstractmethod
    def sums(self, logits: Tensor, labels: Tensor, before: Tensor, bounds: Bounds) -> Sums:
        """What a batch scored.

        Args:
            logits: what the model returned.
            labels: of the batch.
            before: int64 (B,), tokens of the same stream before each example.
            bounds: from `bounds`.
        """

    def bounds(self, longest: int) -> Bounds:
        """Buckets of positions that scores are told apart by; none where positions mean nothing.

        Args:
            longest: most tokens up to the end of an example, with those of its stream before it.
        """
        return ()

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What the metric adds up, (B, T) for logits (B, T, V) and labels (B, T)."""
        return score_of(self.kind)(logits, labels)
