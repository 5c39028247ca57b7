"""The trainer: Hugging Face's `Trainer` under a preset's settings, with honest ends.

Hugging Face's loop brings checkpoints, resume and logging. Added here: the optimiser of the preset, accuracy, a loss
that stops being finite ends the run at once, progress goes to a callback, and a resumed run continues bit for bit from
the last checkpoint that was written completely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from subquad.models.classifier import SubquadForSequenceClassification
from subquad.tasks.kinds import ClassificationData
from subquad.training.checkpoint import (
    check_checkpoint,
    checkpoint_path,
    checkpoint_step,
    last_complete_checkpoint,
    read_state,
)
from subquad.training.dataset import Collator, SplitDataset
from subquad.training.presets import TrainingSettings
from subquad.training.progress import Progress, ProgressCallback, read_seconds

EVALUATION_BATCHES = 4
"""Evaluation needs no gradients, so its batches are this many times larger."""


_SPLITS = {"eval": "validation", "test": "test"}
"""Our names of the splits, by the trainer's prefix of their metrics."""


class DivergenceError(Exception):
    """A loss was not finite."""

    def __init__(self, split: str, step: int, loss: float) -> None:
        super().__init__(f"the {split} loss became {loss} at step {step}; try a lower learning rate")
        self.step = step


@dataclass(frozen=True)
class Outcome:
    """Test scores of a finished run, as (step, validation accuracy, test accuracy), and its learning curve.

    Attributes:
        best_validation: at the evaluation with the best validation accuracy, the earliest of equals.
        last_step: after the last step.
        curve: (step, training loss since the point before, validation accuracy).
        seconds: of training, over all sittings if the run was resumed.
    """

    best_validation: tuple[int, float, float]
    last_step: tuple[int, float, float]
    curve: tuple[tuple[int, float, float], ...]
    seconds: float


class SubquadTrainer(Trainer):
    """Trains a classifier under the settings of a preset."""

    def __init__(
        self,
        model: SubquadForSequenceClassification,
        data: ClassificationData,
        settings: TrainingSettings,
        *,
        directory: Path,
        seed: int,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=_arguments(settings, directory, seed),
            train_dataset=SplitDataset(data.train),
            eval_dataset=SplitDataset(data.validation, by_length=True),
            data_collator=Collator(data.pad_token_id),
            compute_metrics=_accuracy,
            callbacks=[ProgressCallback(progress, directory)],
        )
        self.remove_callback(PrinterCallback)
        self._data = data

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One step.

        Raises:
            DivergenceError: the loss is not finite.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(value := float(loss)):
            raise DivergenceError("training", self.state.global_step + 1, value)
        return loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and accuracy of a split.

        Raises:
            DivergenceError: the loss is not finite; an accuracy would say nothing.
        """
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if not math.isfinite(value := metrics[f"{metric_key_prefix}_loss"]):
            raise DivergenceError(_SPLITS[metric_key_prefix], self.state.global_step, value)
        return metrics

    def fit(self) -> Outcome:
        """Train, from the last complete checkpoint if there is one, and score the best and the last model on test.

        Raises:
            DivergenceError: a loss was not finite.
            CheckpointError: a checkpoint that is needed is damaged.
        """
        directory = Path(str(self.args.output_dir))
        checkpoint = last_complete_checkpoint(directory)
        if checkpoint is not None:
            check_checkpoint(checkpoint)
        if checkpoint is not None and checkpoint_step(checkpoint) >= self.args.max_steps:  # only the scoring is missing
            self._load_weights(checkpoint)
            self.state = read_state(checkpoint)
        else:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        history = self.state.log_history
        validation = [(int(entry["step"]), entry["eval_accuracy"]) for entry in history if "eval_accuracy" in entry]
        best_step, best_accuracy = max(validation, key=lambda point: (point[1], -point[0]))
        last_step, last_accuracy = validation[-1]
        last_test = self._test_accuracy()
        best_test = last_test
        if best_step != last_step:
            best_checkpoint = checkpoint_path(directory, best_step)
            check_checkpoint(best_checkpoint)
            self._load_weights(best_checkpoint)
            best_test = self._test_accuracy()
        losses = {int(entry["step"]): entry["loss"] for entry in history if "loss" in entry}
        return Outcome(
            best_validation=(best_step, best_accuracy, best_test),
            last_step=(last_step, last_accuracy, last_test),
            curve=tuple((step, losses[step], accuracy) for step, accuracy in validation),
            seconds=read_seconds(directory),
        )

    def first_batch(self) -> dict[str, Tensor]:
        """The first examples of the training split as a batch on the model's device: the same for every mechanism."""
        dataset = SplitDataset(self._data.train)
        collate = Collator(self._data.pad_token_id)
        batch = collate([dataset[i] for i in range(min(len(dataset), self.args.train_batch_size))])
        return {name: tensor.to(self.args.device) for name, tensor in batch.items()}

    def _test_accuracy(self) -> float:
        dataset = SplitDataset(self._data.test, by_length=True)
        return self.evaluate(dataset, metric_key_prefix="test")["test_accuracy"]

    def _load_weights(self, checkpoint: Path) -> None:
        assert isinstance(self.model, SubquadForSequenceClassification)
        best = SubquadForSequenceClassification.from_pretrained(checkpoint)
        self.model.load_state_dict(best.state_dict())


def _arguments(settings: TrainingSettings, directory: Path, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(directory),
        seed=seed,
        data_seed=seed,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size * EVALUATION_BATCHES,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_epsilon=settings.epsilon,
        max_grad_norm=settings.gradient_clip,
        eval_strategy="steps",
        eval_steps=settings.evaluate_every,
        logging_steps=settings.evaluate_every,
        save_strategy="steps",
        save_steps=settings.evaluate_every,
        save_total_limit=2,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}
