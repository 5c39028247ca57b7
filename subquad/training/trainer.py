"""The trainer: Hugging Face's `Trainer` under a preset's settings, with honest ends.

Hugging Face's loop brings checkpoints, resume and logging. Added here: the optimiser of the preset, the order of the
data, the scores of the objective, the memory of streams; a loss that stops being finite ends the run at once, progress
goes to a callback, and a resumed run continues bit for bit from the last checkpoint that was written completely.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer
from transformers.trainer_callback import PrinterCallback

from subquad.divergence import DivergenceError
from subquad.models.pretrained import SubquadPreTrainedModel
from subquad.tasks.splits import Split
from subquad.training.arguments import SCORE, training_arguments
from subquad.training.checkpoint import (
    STREAM_FILE,
    check_checkpoint,
    checkpoint_path,
    checkpoint_step,
    last_complete_checkpoint,
    read_state,
)
from subquad.training.dataset import BEFORE
from subquad.training.feeding import evaluation_dataset, first_batch, longest_context, training_dataset
from subquad.training.objectives.base import Objective
from subquad.training.outcome import Outcome
from subquad.training.presets import TrainingSettings
from subquad.training.progress import Progress, ProgressCallback, read_seconds
from subquad.training.scoring import Measured, measure
from subquad.training.smoothing import check_smoothing, smoothing_term
from subquad.training.stream import StreamMemory, memory_of

_SPLITS = {"eval": "validation", "test": "test"}
"""Our names of the splits, by the trainer's prefix of their metrics."""


class SubquadTrainer(Trainer):
    """Trains a model of an objective under the settings of a preset."""

    def __init__(
        self,
        model: SubquadPreTrainedModel,
        objective: Objective[Any, Any],
        settings: TrainingSettings,
        *,
        directory: Path,
        progress: Progress | None = None,
    ) -> None:
        check_smoothing(objective, settings)
        super().__init__(
            model=model,
            args=training_arguments(settings, objective.kind, directory, objective.seed),
            train_dataset=training_dataset(objective, settings),
            eval_dataset=evaluation_dataset(objective, settings, objective.data.validation),
            data_collator=objective.collator,
            compute_metrics=self._measure,
            callbacks=[ProgressCallback(progress, directory)],
        )
        self.remove_callback(PrinterCallback)
        self._task, self._settings = objective, settings
        self._bounds = objective.bounds(longest_context(objective, settings))
        self._measured: Measured | None = None
        self._memory = self._new_memory()

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

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss, in training with smoothed labels; with a memory, of windows that go on where others ended."""
        arguments = {name: value for name, value in inputs.items() if name != BEFORE}
        if self._memory is not None:
            arguments |= {"past_key_values": self._memory.before(inputs[BEFORE] > 0), "use_cache": True}
        loss, outputs = cast(Any, super().compute_loss(model, arguments, True, num_items_in_batch))
        if self._memory is not None:
            self._memory.after(outputs["past_key_values"])
        if model.training and (smoothing := self._settings.label_smoothing):
            loss = loss + smoothing_term(outputs["logits"], inputs["labels"], smoothing, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Loss and sums of a batch; its logits are dropped at once."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            sums = self._task.sums(outputs["logits"], inputs["labels"], inputs[BEFORE], self._bounds)
        return loss.detach(), (sums.totals, sums.totals_by_bucket), (sums.asked, sums.asked_by_bucket)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and score of a split.

        Raises:
            DivergenceError: the loss is not finite; a score would say nothing.
        """
        training_memory, self._memory = self._memory, self._new_memory()
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._memory = training_memory
        if not math.isfinite(value := metrics[f"{metric_key_prefix}_loss"]):
            raise DivergenceError(_SPLITS[metric_key_prefix], self.state.global_step, value)
        return metrics

    def fit(self) -> Outcome:
        """Train, from the last complete checkpoint if there is one, and score the best and the last model on test.

        The best model stays loaded.

        Raises:
            DivergenceError: a loss was not finite.
            DamagedCheckpointError: a checkpoint that is needed is damaged.
        """
        directory = Path(str(self.args.output_dir))
        checkpoint = last_complete_checkpoint(directory)
        if checkpoint is not None:
            check_checkpoint(checkpoint, of_stream=self._memory is not None)
        if checkpoint is not None and checkpoint_step(checkpoint) >= self.args.max_steps:  # only the scoring is missing
            self._load_weights(checkpoint)
            self.state = read_state(checkpoint)
        else:
            if checkpoint is not None and self._memory is not None:
                self._memory.restore(load_file(checkpoint / STREAM_FILE))
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        key, goodness = f"eval_{SCORE}", self._task.kind.goodness
        history = self.state.log_history
        validation = [(int(entry["step"]), entry[key]) for entry in history if key in entry]
        best_step, best_score = max(validation, key=lambda point: (goodness(point[1]), -point[0]))
        last_step, last_score = validation[-1]
        best_test = last_test = self._test()
        if best_step != last_step:
            best_checkpoint = checkpoint_path(directory, best_step)
            check_checkpoint(best_checkpoint)
            self._load_weights(best_checkpoint)
            best_test = self._test()
        losses = {int(entry["step"]): entry["loss"] for entry in history if "loss" in entry}
        return Outcome(
            best_validation=(best_step, best_score, best_test),
            last_step=(last_step, last_score, last_test),
            curve=tuple((step, losses[step], score) for step, score in validation),
            seconds=read_seconds(directory),
            carries_state=self._memory is not None if self._settings.stream else None,
        )

    def first_batch(self) -> dict[str, Tensor]:
        """The first examples of the training split as a batch on the model's device: the same for every mechanism."""
        batch = first_batch(self._task, self.args.train_batch_size)
        return {name: tensor.to(self.args.device) for name, tensor in batch.items()}

    def _test(self) -> Measured:
        test: Split = self._task.data.test
        self.evaluate(evaluation_dataset(self._task, self._settings, test), metric_key_prefix="test")
        assert self._measured is not None
        return self._measured

    def _measure(self, prediction: EvalPrediction) -> dict[str, float]:
        totals, asked = (cast(tuple[Any, Any], pair) for pair in (prediction.predictions, prediction.label_ids))
        self._measured = measure(totals[0], asked[0], totals[1], asked[1], self._bounds)
        return {SCORE: self._measured.estimate.value}

    def _new_memory(self) -> StreamMemory | None:
        return memory_of(self.model) if self._settings.stream else None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self._memory is not None and output_dir is not None:
            save_file(self._memory.tensors(), Path(output_dir) / STREAM_FILE)

    def _load_weights(self, checkpoint: Path) -> None:
        assert self.model is not None
        self.model.load_state_dict(self._task.load(checkpoint).state_dict())
