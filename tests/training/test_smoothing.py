"""Label smoothing and the schedule of the paper are those of their closed forms, and nothing ignores them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from toy_data import toy, trainer_of
from transformers.optimization import get_inverse_sqrt_schedule

from subquad.tasks.splits import IGNORED
from subquad.training.dataset import BEFORE
from subquad.training.presets import Preset
from subquad.training.smoothing import smoothing_term
from subquad.training.trainer import SubquadTrainer


def test_the_term_makes_the_loss_that_of_smoothed_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[0, 6, IGNORED, 1, 1], [IGNORED, 2, 3, IGNORED, 4]])
    real, smoothing = labels != IGNORED, 0.1
    target = (1 - smoothing) * functional.one_hot(labels[real], 7) + smoothing / 7
    expected = -(target * logits[real].log_softmax(dim=1)).sum(dim=1)
    plain = functional.cross_entropy(logits[real], labels[real])
    torch.testing.assert_close(plain + smoothing_term(logits, labels, smoothing, None), expected.mean())
    of_batch = functional.cross_entropy(logits[real], labels[real], reduction="sum") / 20
    torch.testing.assert_close(of_batch + smoothing_term(logits, labels, smoothing, 20), expected.sum() / 20)
    torch.testing.assert_close(smoothing_term(logits.float(), labels, 0.0, None), torch.tensor(0.0))


def loss_and_logits(trainer: SubquadTrainer, *, training: bool) -> tuple[Tensor, Tensor]:
    assert trainer.model is not None
    trainer.model.train(training)
    torch.manual_seed(0)  # of dropout
    batch = trainer.first_batch() | {BEFORE: torch.zeros(8, dtype=torch.int64)}
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    return loss, outputs["logits"]


def test_training_smooths_and_evaluation_does_not(tiny: Preset, tmp_path: Path) -> None:
    plain = trainer_of(toy("seq2seq"), tiny, tmp_path / "plain")
    smooth = trainer_of(toy("seq2seq"), tiny, tmp_path / "smooth", label_smoothing=0.2)
    assert torch.equal(loss_and_logits(plain, training=False)[0], loss_and_logits(smooth, training=False)[0])
    assert plain._test() == smooth._test()
    loss, logits = loss_and_logits(smooth, training=True)
    term = smoothing_term(logits, smooth.first_batch()["labels"], 0.2, None)
    torch.testing.assert_close(loss, loss_and_logits(plain, training=True)[0] + term)


@pytest.mark.parametrize("kind", ["classification", "causal", "answers", "masked"])
def test_label_smoothing_is_refused_where_it_would_be_ignored(kind: str, tiny: Preset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1 is for tasks from sequence to sequence, which"):
        trainer_of(toy(kind), tiny, tmp_path, label_smoothing=0.1)


def test_the_inverse_square_root_after_a_warm_up_is_the_schedule_of_the_paper() -> None:
    """D^-1/2 min(s^-1/2, s w^-3/2), with D = 512 and w = 4000: at most 6.99e-4, at step 4000."""
    peak = 512**-0.5 * 4000**-0.5
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    schedule = get_inverse_sqrt_schedule(optimizer, num_warmup_steps=4000).lr_lambdas[0]
    rates = {step: peak * schedule(step) for step in (1, 100, 3999, 4000, 4001, 16_000, 100_000)}
    assert rates == pytest.approx({s: 512**-0.5 * min(s**-0.5, s * 4000**-1.5) for s in rates})
    assert max(rates, key=lambda step: rates[step]) == 4000
    assert rates[4000] == pytest.approx(6.99e-4, rel=1e-3)
