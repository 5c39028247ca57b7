"""What a trainer is fed: the splits of a task in the order that the settings ask for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from subquad.tasks.splits import LanguageSplit, Split
from subquad.training.dataset import SplitDataset
from subquad.training.objectives.base import Objective
from subquad.training.order import Order, ShuffledOrder, SortedOrder, StreamOrder, Visit, WholeStreamOrder, Windows
from subquad.training.presets import TrainingSettings


def training_dataset(objective: Objective[Any, Any], settings: TrainingSettings) -> SplitDataset[Any]:
    """All that is seen in a training, in order: `batch_size` places a step.

    Raises:
        ValueError: a stream of data that is none, or too short for the rows of a batch.
    """
    split, places = objective.data.train, settings.steps * settings.batch_size
    order: Order = ShuffledOrder(len(split), places, objective.seed)
    if settings.stream:
        order = StreamOrder(windows_of(split), settings.batch_size, places, objective.seed)
    return SplitDataset(split, order, objective.example)


def evaluation_dataset(objective: Objective[Any, Any], settings: TrainingSettings, split: Split) -> SplitDataset[Any]:
    """Every example of a split once.

    Raises:
        ValueError: a stream of data that is none.
    """
    order: Order = SortedOrder(split.lengths)
    if settings.stream:
        order = WholeStreamOrder(windows_of(split), settings.batch_size)
    return SplitDataset(split, order, objective.example)


def longest_context(objective: Objective[Any, Any], settings: TrainingSettings) -> int:
    """Most tokens of an example; in a stream, most tokens of a document that a row of an evaluation holds.

    Raises:
        ValueError: a stream of data that is none.
    """
    data = objective.data
    if not settings.stream:
        return data.max_length
    orders = (WholeStreamOrder(windows_of(split), settings.batch_size) for split in (data.validation, data.test))
    return max(order.longest for order in orders)


def first_batch(objective: Objective[Any, Any], batch_size: int) -> dict[str, Tensor]:
    """The first examples of the training split."""
    split = objective.data.train
    visits = [Visit(example, 0) for example in range(min(len(split), batch_size))]
    return objective.collator([objective.example(split, visit) for visit in visits])


def windows_of(split: Split) -> Windows:
    """The examples of a split as windows of documents.

    Raises:
        ValueError: data that are no stream.
    """
    if not isinstance(split, LanguageSplit) or split.continues is None:
        raise ValueError(
            "[training]: stream = true needs data whose examples are consecutive windows of documents, which this "
            "task's are not; leave it out"
        )
    return Windows(split.continues, split.inputs.offsets)
