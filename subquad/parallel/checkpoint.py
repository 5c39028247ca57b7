"""Checkpoints of a run on many processes, which a run on any other number of them, or one process, can read.

    <output>/step-00000100/model.safetensors       whole parameters and buffers, by name
                           config.json             with it, a folder that `from_pretrained` reads
                           optimizer.safetensors   the optimizer's numbers, "<parameter>/<name>"
                           training.json           step, seed, and what else the program wants to know

Parameters are gathered one after the other, and the first process keeps and writes them; its memory must hold all. The
folder is written under another name, synced and renamed: it is there whole or not at all. Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from transformers import PreTrainedModel

from subquad.parallel.gradients import local_part
from subquad.records.atomic import sync

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "training.json"


class CheckpointError(ValueError):
    """A checkpoint can't be written or read."""


def checkpoint_folder(output: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return output / f"step-{step:08d}"


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint under `output`, or None."""
    return next(reversed(_all_checkpoints(output)), None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What the program wrote beside the tensors.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint / STATE_FILE, error) from error


def save_checkpoint(
    output: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, *, step: int, state: dict[str, Any]
) -> Path:
    """Gather everything and write it; every process must call this.

    Args:
        output: a folder that the first process can write; the others needn't see it.
        model: parallelised or not.
        optimizer: of its parameters.
        step: steps done.
        state: written beside the tensors, JSON.

    Raises:
        CheckpointError: the folder can't be written; on every process.
    """
    folder, writes = checkpoint_folder(output, step), dist.get_rank() == 0
    tensors = _gathered(_model_tensors(model), keep=writes)
    numbers = _gathered(_optimizer_tensors(model, optimizer), keep=writes)
    problem = None
    if writes:
        try:
            _write(folder, model, tensors, numbers, {**state, "step": step})
        except (OSError, SafetensorError) as error:
            problem = error
    failed = torch.tensor(problem is not None, dtype=torch.int64, device=next(model.parameters()).device)
    dist.all_reduce(failed)
    if int(failed):
        reason = problem or "see the first process"
        raise CheckpointError(f"can't write the checkpoint {folder}: {reason}") from problem
    return folder


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Read this process's parts; every process must see the folder, and they don't talk.

    Args:
        checkpoint: from `last_checkpoint`.
        model: of the same sizes, parallelised on any grid or not.
        optimizer: AdamW or another whose numbers are shaped as the parameters or are scalars; None to leave it.

    Returns:
        The state that was written.

    Raises:
        CheckpointError: a file is missing or damaged, or is of another model.
    """
    state = read_state(checkpoint)
    with ExitStack() as files, torch.no_grad():
        stored = _open(checkpoint / MODEL_FILE, files)
        tensors = dict(_model_tensors(model))
        _check_names(checkpoint, set(tensors), set(stored.keys()))
        for name, tensor in tensors.items():
            local_part(tensor).copy_(local_part(_like(stored.get_tensor(name), tensor, checkpoint, name)))
        if optimizer is not None:
            _load_optimizer(_open(checkpoint / OPTIMIZER_FILE, files), checkpoint, model, optimizer)
    return state


def gather(tensor: Tensor) -> Tensor:
    """All of a tensor, wherever its parts lie; every process that has one must call this.

    One dimension of the mesh after the other, in the order opposite to that in which they were cut.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    for dim in range(tensor.device_mesh.ndim):
        kept = tensor.placements[dim + 1 :]
        tensor = tensor.redistribute(placements=[Replicate()] * (dim + 1) + list(kept))
    return tensor.to_local()


def check_agreement(step: int, device: torch.device) -> None:
    """Check that all processes have read the same checkpoint, which every machine must see.

    Raises:
        CheckpointError: they have not.
    """
    ends = torch.tensor([step, -step], device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    latest, earliest = int(ends[0]), -int(ends[1])
    if latest != earliest:
        raise CheckpointError(
            f"the processes go on from different steps, {earliest} to {latest}: put the output folder where all "
            "machines see it, or copy the newest checkpoint to each"
        )


def remove_older(output: Path, *, keep: int) -> None:
    """Delete all but the newest checkpoints, and what an interrupted one has left."""
    for path in [*_all_checkpoints(output)[:-keep], *output.glob(".step-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _all_checkpoints(output: Path) -> list[Path]:
    """The oldest first."""
    found = [path for path in output.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, a shared one once, and the buffers that are saved."""
    yield from model.named_parameters()
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{name}/{key}", torch.as_tensor(value)


def _gathered(tensors: Iterator[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    whole = {}
    for name, tensor in tensors:
        full = gather(tensor.detach())
        if keep:
            whole[name] = full.cpu().clone(memory_format=torch.contiguous_format)
    return whole


def _write(
    folder: Path, model: PreTrainedModel, tensors: dict[str, Tensor], numbers: dict[str, Tensor], state: dict[str, Any]
) -> None:
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / MODEL_FILE, metadata={"format": "pt"})
    save_file(numbers, temporary / OPTIMIZER_FILE)
    config = model.config.__class__.from_dict(model.config.to_dict())
    config.architectures = [_own_class(model).__name__]
    config.save_pretrained(temporary)
    (temporary / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync(folder.parent)


def _own_class(model: nn.Module) -> type:
    """The model's class, behind the one that `fully_shard` has put in front of it."""
    return next(found for found in type(model).__mro__ if not issubclass(found, FSDPModule))


def _like(whole: Tensor, tensor: Tensor, checkpoint: Path, name: str) -> Tensor:
    """The part of a whole tensor that lies here, as that of another does."""
    if whole.shape != tensor.shape:
        raise CheckpointError(
            f"{checkpoint}: {name} has shape {tuple(whole.shape)}, but the model's has {tuple(tensor.shape)}; build "
            "the model with the sizes that it was trained with"
        )
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)


def _open(path: Path, files: ExitStack) -> Any:
    try:
        return files.enter_context(safe_open(path, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _check_names(checkpoint: Path, expected: set[str], found: set[str]) -> None:
    if expected != found:
        missing, unknown = sorted(expected - found), sorted(found - expected)
        raise CheckpointError(
            f"{checkpoint} is of another model: missing {missing[:3]}, not in the model {unknown[:3]}; build the model "
            "with the options that it was trained with"
        )


def _load_optimizer(stored: Any, checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    for key in stored.keys():  # noqa: SIM118 - the file is no dict
        name, _, number = key.rpartition("/")
        if name not in parameters:
            _check_names(checkpoint, set(parameters), {name})
        whole, parameter = stored.get_tensor(key), parameters[name]
        scalar = whole.ndim == 0 and parameter.ndim > 0
        optimizer.state[parameter][number] = whole if scalar else _like(whole, parameter, checkpoint, key)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: can't be read ({error}); delete the folder {path.parent} to go on from the checkpoint before it"
    )
