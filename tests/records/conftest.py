"""Factories of small valid records, each field of which a test may replace."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from subquad.records.schema import ProfileRecord, RunRecord

ENVIRONMENT: dict[str, Any] = {
    "hardware": "test-cpu-2-threads",
    "cpu": "Test CPU",
    "accelerator": None,
    "threads": 2,
    "memory_bytes": 8_000_000_000,
    "operating_system": "Linux",
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "subquad": "0.1.0",
    "commit": None,
}
TASK: dict[str, Any] = {
    "name": "copying",
    "title": "Copying",
    "is_lra": False,
    "objective": "classification",
    "metric": "accuracy",
    "data_hash": "abc123",
    "train_size": 100,
    "validation_size": 50,
    "test_size": 400,
    "vocab_size": 10,
    "num_labels": 2,
    "max_length": 1000,
}
COST: dict[str, Any] = {"flops": 10, "activation_bytes": 20, "state_bytes": 0, "parameters": 30}


def run_document(name: str = "local", seed: int = 0, accuracy: float = 0.5, **changes: Any) -> dict[str, Any]:
    error = math.sqrt(accuracy * (1 - accuracy) / 400)
    score = {"step": 10, "validation": accuracy, "test": accuracy, "test_standard_error": error}
    metric = {"name": "accuracy", "higher_is_better": True, "examples": 400, "asked": 400}
    return {
        "schema_version": 1,
        "created": "2026-11-22T04:30:00+00:00",
        "command": "subquad compare",
        "mixer": {"name": name},
        "environment": ENVIRONMENT,
        "status": "ok",
        "task": TASK,
        "placement": "sublayer",
        "model": {"hidden_size": 64, "num_hidden_layers": 2},
        "parameters": 1000,
        "parameters_of_dense": 1000,
        "preset": "quick",
        "steps": 10,
        "budget": {"kind": "steps", "amount": 10},
        "seed": seed,
        "metric": {**metric, "best_validation": score, "last_step": score},
        "curve": [{"step": 5, "train_loss": 1.0, "validation": 0.4}],
        "train_seconds": 3.0,
        **changes,
    }


def profile_document(name: str, milliseconds: dict[int, tuple[float, float]], **changes: Any) -> dict[str, Any]:
    """`milliseconds` maps a length to the forward + backward of the mechanism and of dense attention."""

    def timing(value: float) -> dict[str, Any]:
        return {"samples_seconds": [value / 1000]}

    points = [
        {
            "length": length,
            "forward": timing(mine / 3),
            "forward_backward": timing(mine),
            "dense_forward": timing(dense / 3),
            "dense_forward_backward": timing(dense),
            "saved_bytes": 100 * length,
            "dense_saved_bytes": 200 * length,
            "peak_bytes": None,
            "dense_peak_bytes": None,
            "cost": COST,
            "dense_cost": COST,
        }
        for length, (mine, dense) in milliseconds.items()
    ]
    return {
        "schema_version": 1,
        "created": "2026-11-22T04:30:00+00:00",
        "command": "subquad profile",
        "mixer": {"name": name},
        "environment": ENVIRONMENT,
        "status": "ok",
        "embed_dim": 64,
        "num_heads": 4,
        "batch_size": 1,
        "dtype": "float32",
        "causal": False,
        "points": points,
        **changes,
    }


@pytest.fixture
def make_run() -> Callable[..., RunRecord]:
    return lambda *args, **changes: RunRecord.model_validate_json(json.dumps(run_document(*args, **changes)))


@pytest.fixture
def make_profile() -> Callable[..., ProfileRecord]:
    return lambda *args, **changes: ProfileRecord.model_validate_json(json.dumps(profile_document(*args, **changes)))
