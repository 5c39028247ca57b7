"""Made-up task data of every objective, small enough for trainings of a fraction of a second, and what trains on it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from subquad.benchmark.mixers import parse_mixer
from subquad.labels import IGNORED
from subquad.tasks.base import TaskData
from subquad.tasks.kinds import CausalData, ClassificationData, MaskedData, Seq2SeqData
from subquad.tasks.splits import LabelledSplit, LanguageSplit, PairedSplit, Ragged, Split
from subquad.training.objectives.registry import objective_of
from subquad.training.presets import Preset
from subquad.training.progress import Progress
from subquad.training.trainer import SubquadTrainer

PAD, EXTRA, VOCABULARY = 6, 7, 9
WINDOW, LONGEST = 8, 12


def ragged(lengths: list[int], seed: int) -> Ragged:
    """Tokens 0 .. 5, each usually the one before plus one."""
    steps = np.random.default_rng(seed).choice([1, 1, 1, 2], sum(lengths))
    return Ragged.from_lengths((np.cumsum(steps) % 6).astype(np.uint8), np.array(lengths))


def lengths_of(count: int) -> list[int]:
    return [4 + (5 * index) % (LONGEST - 3) for index in range(count)]


def labelled(count: int, seed: int) -> LabelledSplit:
    inputs = ragged(lengths_of(count), seed)
    return LabelledSplit(inputs, np.array([int(tokens[0]) % 3 for tokens in inputs], dtype=np.int64))


def language(count: int, seed: int) -> LanguageSplit:
    return LanguageSplit(ragged(lengths_of(count), seed))


def answers(count: int, seed: int) -> LanguageSplit:
    """Every third position asks for the first token."""
    inputs = ragged(lengths_of(count), seed)
    labels = [np.where(np.arange(len(tokens)) % 3 == 2, int(tokens[0]), IGNORED) for tokens in inputs]
    return LanguageSplit(inputs, np.concatenate(labels).astype(np.int32))


def stream(count: int, seed: int) -> LanguageSplit:
    """Windows of documents that have seven each, the last of a document shorter."""
    places = np.arange(count) % 7
    return LanguageSplit(ragged([WINDOW - 3 * int(place == 6) for place in places], seed), continues=places > 0)


def paired(count: int, seed: int) -> PairedSplit:
    inputs = ragged([length - 1 for length in lengths_of(count)], seed)
    return PairedSplit(inputs, Ragged(inputs.values[::-1].copy(), inputs.offsets))


def toy(kind: str, **changes: Any) -> TaskData[Any]:
    """Data of a kind: classification, causal, answers, stream, masked or seq2seq."""
    classes: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
        "classification": (ClassificationData, labelled, "accuracy", {"num_labels": 3}),
        "causal": (CausalData, language, "bits_per_byte", {}),
        "answers": (CausalData, answers, "accuracy", {}),
        "stream": (CausalData, stream, "bits_per_byte", {}),
        "masked": (MaskedData, language, "bits_per_byte", {"mask_token_id": EXTRA, "mask_share": 0.3}),
        "seq2seq": (Seq2SeqData, paired, "accuracy", {"start_token_id": EXTRA, "end_token_id": EXTRA + 1}),
    }
    data_class, make, metric, own = classes[kind]
    splits: dict[str, Split] = {name: make(40, seed) for seed, name in enumerate(("train", "validation", "test"))}
    common = {"name": kind, "preset": "toy", "title": kind, "is_lra": False, "metric": metric, "data_hash": "0"}
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "max_length": LONGEST}
    return data_class(**(common | sizes | splits | own | changes))


def trainer_of(
    data: TaskData[Any],
    preset: Preset,
    directory: Path,
    *,
    mixer: str = "full",
    seed: int = 0,
    progress: Progress | None = None,
    **training: Any,
) -> SubquadTrainer:
    """A trainer under a preset, as the worker makes it."""
    objective, config = objective_of(data, seed=seed), parse_mixer(mixer).config
    torch.manual_seed(seed)
    model = objective.build(objective.model_settings(preset.model_dict(), config), config)
    settings = replace(preset.training, **training)
    return SubquadTrainer(model, objective, settings, directory=directory, progress=progress)
