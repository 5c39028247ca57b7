"""Hugging Face's Trainer trains every class as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import config
from torch import Tensor
from transformers import EvalPrediction, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from subquad.models import (
    SubquadForCausalLM,
    SubquadForMaskedLM,
    SubquadForPairClassification,
    SubquadForSeq2SeqLM,
    SubquadForSequenceClassification,
)

TOKENS = torch.randint(1, 11, (9,), generator=torch.Generator().manual_seed(0))
ONES = torch.ones_like(TOKENS)
EXAMPLES: dict[Any, dict[str, Tensor]] = {
    SubquadForCausalLM: {"input_ids": TOKENS, "attention_mask": ONES, "labels": TOKENS},
    SubquadForMaskedLM: {"input_ids": TOKENS, "attention_mask": ONES, "labels": TOKENS},
    SubquadForSeq2SeqLM: {"input_ids": TOKENS, "attention_mask": ONES, "labels": TOKENS[:5]},
    SubquadForSequenceClassification: {"input_ids": TOKENS, "labels": torch.tensor(1)},
    SubquadForPairClassification: {"input_ids": TOKENS, "pair_input_ids": TOKENS.flip(0), "labels": torch.tensor(1)},
}


@pytest.mark.parametrize("model_class", EXAMPLES)
def test_the_trainer_trains_it(model_class: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_class(config(mixer=["full", "local", "full"], num_hidden_layers=2))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    data: Any = [EXAMPLES[model_class]] * 8
    trainer = Trainer(model, arguments, train_dataset=data)
    assert trainer.model_accepts_loss_kwargs
    loss = trainer.train().training_loss
    assert 0 < loss < 10
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_trainer_of_sequences_evaluates_what_is_generated(tmp_path: Path) -> None:
    model = SubquadForSeq2SeqLM(config())
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), predict_with_generate=True, report_to="none", disable_tqdm=True, use_cpu=True
    )
    data: Any = [EXAMPLES[SubquadForSeq2SeqLM]] * 3
    generated: list[Any] = []

    def note(prediction: EvalPrediction) -> dict[str, float]:
        generated.append(np.asarray(prediction.predictions)[:, :5].tolist())
        return {}

    trainer = Seq2SeqTrainer(model, arguments, eval_dataset=data, compute_metrics=note)
    assert 0 < trainer.evaluate(max_new_tokens=4)["eval_loss"] < 10
    generating: Any = model
    assert generated == [generating.generate(TOKENS.expand(3, -1), do_sample=False, max_new_tokens=4).tolist()]
