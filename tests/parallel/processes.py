"""Runs a function on several gloo processes, with a limit of time."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT_SECONDS = 90.0

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "subquad.models", "subquad.parallel.parallelise"])


def run_on(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of `function(*arguments)` on so many processes, in the order of their ranks.

    Function and arguments are pickled, the function by its name; results are tensors, numbers, and containers of them.

    Raises:
        AssertionError: a process failed or didn't end in time, with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _CONTEXT.Process(target=_work, args=(rank, world_size, folder, function, arguments), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        waiting = {process.sentinel for process in processes}
        while waiting:
            ended = wait(waiting, timeout=LIMIT_SECONDS)
            failed = not ended or any(process.exitcode for process in processes if process.sentinel in ended)
            waiting -= set(ended)
            if failed:
                break
        for process in processes:
            if waiting:
                process.join(2)
            process.kill()
            process.join()
        said = "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.txt")))
        assert not any(process.exitcode for process in processes), said or "a process ended or was stopped"
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _work(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=LIMIT_SECONDS / 2),
        )
        result = function(*arguments)
        dist.barrier()
        dist.destroy_process_group()
        torch.save(result, Path(folder) / f"{rank}.pt")
    except BaseException:
        (Path(folder) / f"{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
