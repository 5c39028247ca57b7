"""The objectives by the name that task data gives. A new one is its own file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from subquad.tasks.base import TaskData
from subquad.tasks.kinds import CausalData, ClassificationData, MaskedData, Seq2SeqData
from subquad.training.objectives.base import Objective
from subquad.training.objectives.causal import CausalObjective
from subquad.training.objectives.classification import ClassificationObjective
from subquad.training.objectives.masked import MaskedObjective
from subquad.training.objectives.seq2seq import Seq2SeqObjective

OBJECTIVES: Mapping[str, type[Objective[Any, Any]]] = MappingProxyType(
    {
        ClassificationData.objective: ClassificationObjective,
        CausalData.objective: CausalObjective,
        MaskedData.objective: MaskedObjective,
        Seq2SeqData.objective: Seq2SeqObjective,
    }
)
"""Every objective by its name."""


def objective_of(data: TaskData[Any], *, seed: int) -> Objective[Any, Any]:
    """What to train on this data."""
    return OBJECTIVES[data.objective](data, seed=seed)
