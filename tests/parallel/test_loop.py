"""Steps of the training program on several processes against a plain loop on one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_on
from small_runs import EXPERTS, loop_on, settings, text, whole_parameters
from torch import Tensor

from subquad.divergence import DivergenceError
from subquad.parallel.checkpoint import last_checkpoint
from subquad.parallel.grid import DATA, Grid
from subquad.parallel.loop import batch_of, learning_rate
from subquad.parallel.settings import Settings
from subquad.parallel.train import build_model

Results = tuple[list[float], dict[str, Tensor]]
PER_SEQUENCE = {**EXPERTS, "capacity_factor": 0.5, "min_capacity": 1, "balance_weight": 0.1, "group": "sequence"}
RUNS = {
    "causal": settings(),
    "masked": settings(objective="masked", masked_share=0.3, mixer="local"),
    "a cut gradient": settings(clip=0.01, weight_decay=0.5),
    "seats and a loss for each sequence": settings(feedforward=PER_SEQUENCE),
}


def plain_steps(given: Settings, parts: int) -> Results:
    """Losses and parameters after a few steps of an ordinary loop, the batch in so many parts one after the other."""
    model = build_model(given)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": given.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer, losses = torch.optim.AdamW(groups), []
    for step in range(given.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, given)
        ids, labels, count = batch_of(text(given), given, step)
        total = torch.zeros(())
        for part_ids, part_labels in zip(ids.chunk(parts), labels.chunk(parts), strict=True):
            output: Any = model(input_ids=part_ids, labels=part_labels, num_items_in_batch=count / parts)
            total = total + output.loss / parts
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), given.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()))
    return losses, whole_parameters(model)


def steps_of(name: str, grid: Grid) -> Results:
    return steps(RUNS[name], grid)


def steps(given: Settings, grid: Grid) -> Results:
    loop = loop_on(grid, given)
    losses = [loop.mean(loop.step(step)[0]) for step in range(given.steps)]
    return losses, whole_parameters(loop.model)


def all_steps(grid: Grid) -> dict[str, Results]:
    return {name: steps(given, grid) for name, given in RUNS.items()}


@pytest.mark.parametrize("grid", [Grid(1), Grid(2), Grid(2, 2)], ids=str)
def test_steps_equal_those_of_a_plain_loop(grid: Grid) -> None:
    expected = {name: plain_steps(given, parts=1) for name, given in RUNS.items()}
    for process in run_on(grid.processes, all_steps, grid):
        torch.testing.assert_close(process, expected, rtol=1e-4, atol=1e-5)


def steps_with_a_batch_loss(grid: Grid) -> Results:
    return steps(settings(feedforward={**EXPERTS, "balance_weight": 0.1, "capacity_factor": 1.0}), grid)


def test_what_a_batch_shares_is_shared_by_the_part_of_a_row() -> None:
    given = settings(feedforward={**EXPERTS, "balance_weight": 0.1, "capacity_factor": 1.0})
    of_parts, of_whole = plain_steps(given, parts=2), plain_steps(given, parts=1)
    for process in run_on(2, steps_with_a_batch_loss, Grid(2)):
        torch.testing.assert_close(process, of_parts, rtol=1e-4, atol=1e-5)
        assert max(abs(one - other) for one, other in zip(process[0], of_whole[0], strict=True)) > 1e-4


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_the_loss_of_a_batch_is_its_mean_cross_entropy_and_all_of_its_auxiliary_loss(objective: Any) -> None:
    given = settings(objective=objective, length=8, feedforward={**EXPERTS, "balance_weight": 1.0})
    ids, labels, count = batch_of(text(given), given, 0)
    output: Any = build_model(given)(input_ids=ids, labels=labels, num_items_in_batch=count)
    shift = int(objective == "causal")
    logits, asked = output.logits[:, : 8 - shift], labels[:, shift:]
    cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), asked.flatten())  # -100 counts for nothing
    torch.testing.assert_close(output.loss - cross_entropy, output.aux_loss, rtol=1e-5, atol=1e-5)
    assert float(output.aux_loss.detach()) > 0.9


NOISY: dict[str, Any] = {"name": "switch", "experts": 4, "jitter": 0.1, "expert_dropout": 0.2}


def noisy_losses(grid: Grid, dtype: str, feedforward: Any) -> tuple[list[float], int]:
    given = settings(feedforward=feedforward, dropout=0.1, dtype=dtype)
    loop = loop_on(grid, given)
    loop.text.bytes.fill_(65)  # all rows have the same examples
    return [float(loop.step(step)[0]) for step in range(2)], loop.mesh.get_local_rank(DATA)


@pytest.mark.parametrize(("dtype", "feedforward"), [("float32", "mlp"), ("float32", NOISY), ("bfloat16", NOISY)])
def test_with_noise_the_processes_of_a_row_agree_and_rows_differ(dtype: str, feedforward: Any) -> None:
    (first, _), (again, _), (other, _), (other_again, row) = run_on(4, noisy_losses, Grid(2, 2), dtype, feedforward)
    assert row == 1
    assert first == again != other == other_again
    assert all(0 < loss < 10 for loss in (*first, *other))


def diverged(output: str) -> str:
    loop = loop_on(Grid(2), settings(output, learning_rate=1e30, warm_up=1, steps=9, checkpoint_every=1))
    try:
        loop.run(0, lambda _: None)
    except DivergenceError as error:
        return str(error)
    return "went on"


def test_a_run_that_diverges_stops_everywhere_and_is_not_saved(tmp_path: Path) -> None:
    first, second = run_on(2, diverged, str(tmp_path))
    assert re.fullmatch(r"the training loss became (nan|inf) at step \d; try a lower learning rate", first)
    assert first == second
    found = last_checkpoint(tmp_path)
    assert found is not None
    assert f"step-{int(first.partition('step ')[2][0]) - 1:08d}" == found.name


def moved_buffers() -> dict[str, Tensor]:
    loop = loop_on(Grid(2), settings(mixer={"name": "routing", "clusters": 2, "window": 4}))
    before = {name: buffer.clone() for name, buffer in loop.model.named_buffers()}
    loop.step(0)
    return {name: buffer for name, buffer in loop.model.named_buffers() if not torch.equal(buffer, before[name])}


def test_buffers_that_training_moves_are_the_same_everywhere() -> None:
    first, second = run_on(2, moved_buffers)
    assert first
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_the_learning_rate_rises_and_falls() -> None:
    given = settings(learning_rate=1.0, warm_up=4)
    assert [learning_rate(step, given) for step in (0, 1, 3, 15)] == [0.25, 0.5, 1.0, 0.5]
