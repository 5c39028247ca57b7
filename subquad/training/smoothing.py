"""Label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7; Vaswani et al. 2017, arXiv 1706.03762, 5.4).

    q = (1 - ε) onehot(y) + ε / V
    -Σ_v q_v log p_v = -log p_y + ε (z_y - mean_v z_v)      z: logits, V of them

So the loss of a model becomes the smoothed one by adding a term that needs no softmax.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from subquad.ops.precision import wide_dtype
from subquad.tasks.splits import IGNORED
from subquad.training.objectives.base import Objective
from subquad.training.presets import TrainingSettings


def check_smoothing(objective: Objective[Any, Any], settings: TrainingSettings) -> None:
    """Refuse a setting that the objective would ignore.

    Raises:
        ValueError: label smoothing where it isn't offered.
    """
    if settings.label_smoothing and not objective.smooths_labels:
        raise ValueError(
            f"[training]: label_smoothing={settings.label_smoothing} is for tasks from sequence to sequence, which "
            f"{objective.data.name!r} is not; leave it out"
        )


def smoothing_term(logits: Tensor, labels: Tensor, smoothing: float, asked: Tensor | int | None) -> Tensor:
    """What a mean cross-entropy lacks to be that of smoothed labels, float32 or wider, 0-dim.

    Args:
        logits: (B, T, V).
        labels: int64 (B, T), `IGNORED` where nothing is asked.
        smoothing: ε.
        asked: how many labels the mean is over; None for those here.
    """
    real = labels != IGNORED
    wide = logits.to(wide_dtype(logits))
    of_label = wide.gather(2, labels.clamp_min(0)[..., None])[..., 0]
    lacking = (of_label - wide.mean(dim=2)).masked_fill(~real, 0.0).sum()
    return smoothing * lacking / (real.sum() if asked is None else asked)
