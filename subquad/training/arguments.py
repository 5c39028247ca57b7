"""A preset's training settings, as Hugging Face's trainer takes them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from subquad.records.metrics import MetricKind
from subquad.training.presets import TrainingSettings

SCORE = "score"
"""What the trainer calls the value of the metric, whichever that is."""

EVALUATION_BATCHES = 4
"""Evaluation needs no gradients, so its batches are this many times larger; those of a stream keep their rows."""


def training_arguments(settings: TrainingSettings, kind: MetricKind, directory: Path, seed: int) -> TrainingArguments:
    """The arguments of a run.

    Args:
        settings: of the preset.
        kind: the metric, whose better values choose the checkpoint that is kept.
        directory: of the checkpoints.
        seed: of initialisation and dropout; the order of the data is the dataset's.
    """
    return TrainingArguments(
        output_dir=str(directory),
        seed=seed,
        max_steps=settings.steps,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size * (1 if settings.stream else EVALUATION_BATCHES),
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
        metric_for_best_model=SCORE,
        greater_is_better=kind.higher_is_better,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
