"""The steps of a run on many processes.

This isn't transformers' Trainer: its tensor parallelism follows plans for transformers' own layers and can't express
mixers and experts that the processes of a row share out among them, all of which need the same examples. Gradients are
clipped and checkpoints written here so that each number counts once, wherever its parts and copies lie.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from subquad.divergence import DivergenceError
from subquad.labels import IGNORED
from subquad.parallel.buffers import take_buffers_of_first_row
from subquad.parallel.byte_text import ByteText, masked
from subquad.parallel.checkpoint import remove_older, save_checkpoint
from subquad.parallel.gradients import clip_gradients
from subquad.parallel.grid import DATA
from subquad.parallel.settings import Settings


@dataclass(frozen=True)
class Progress:
    """What a line of progress tells.

    Attributes:
        step: steps done.
        loss: mean over the bytes of the last step, in nats, auxiliary losses included.
        gradient_norm: before it was cut.
        bytes_per_second: of all processes, since the last line.
    """

    step: int
    loss: float
    gradient_norm: float
    bytes_per_second: float


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW, in groups of parameters that lie on the same mesh, since it goes over a group's tensors at once."""
    groups: dict[tuple[object, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault((getattr(parameter, "device_mesh", None), parameter.ndim > 1), []).append(parameter)
    described = [
        {"params": parameters, "weight_decay": settings.weight_decay if matrices else 0.0}
        for (_, matrices), parameters in groups.items()
    ]
    return torch.optim.AdamW(described, lr=settings.learning_rate)


def learning_rate(step: int, settings: Settings) -> float:
    """Rises to its highest, then falls with the root of the step, whatever number of steps is to come."""
    done, warm_up = step + 1, settings.warm_up
    return settings.learning_rate * min(done / warm_up, (warm_up / done) ** 0.5)


def batch_of(text: ByteText, settings: Settings, step: int) -> tuple[Tensor, Tensor, int]:
    """Ids and labels (B, L) of all processes together, and how many bytes they predict."""
    ids = text.examples(settings.batch, seed=settings.seed, step=step)
    if settings.objective == "causal":
        return ids, ids, ids[:, 1:].numel()
    ids, labels = masked(ids, share=settings.masked_share, seed=settings.seed, step=step)
    return ids, labels, int((labels != IGNORED).sum())


class Loop:
    """Trains a model.

    Args:
        model: parallelised; takes ids and labels, and the number of labels, as Hugging Face's language models do.
        text: equal on all processes.
        settings: likewise.
        mesh: (data, model).
        device: that this process computes on.
    """

    def __init__(
        self, model: PreTrainedModel, text: ByteText, settings: Settings, mesh: DeviceMesh, device: torch.device
    ) -> None:
        self.model, self.text, self.settings, self.mesh, self.device = model, text, settings, mesh, device
        self.optimizer = make_optimizer(model, settings)

    def run(self, start: int, report: Callable[[Progress], None]) -> None:
        """Steps from `start` to the end, a checkpoint now and then and at the end.

        Raises:
            DivergenceError: a loss that is not finite, on all processes; the last checkpoint is from before.
        """
        settings, since, seconds = self.settings, start, time.perf_counter()
        for step in range(start, settings.steps):
            loss, norm = self.step(step)
            done = step + 1
            reports, saves = self._due(done, settings.report_every), self._due(done, settings.checkpoint_every)
            if not (reports or saves):
                continue
            mean = self.mean(loss)
            if not math.isfinite(mean):
                raise DivergenceError("training", done, mean)
            if reports:
                now, count = time.perf_counter(), (done - since) * settings.batch * settings.length
                report(Progress(done, mean, float(norm), count / (now - seconds)))
                since, seconds = done, now
            if saves:
                self.save(done)

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """One step; returns this row's loss, the mean of which over the rows is that over all bytes, and the norm."""
        rank, rows = self.mesh.get_local_rank(DATA), self.mesh[DATA].size()
        torch.manual_seed(self.settings.seed + 1_000_003 * step + 7_919 * rank)  # alike within a row
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.settings)
        ids, labels, count = batch_of(self.text, self.settings, step)
        ids, labels = (whole.chunk(rows)[rank].to(self.device) for whole in (ids, labels))
        with self._narrowed():
            loss = self.model(input_ids=ids, labels=labels, num_items_in_batch=count / rows).loss
        loss.backward()
        norm = clip_gradients(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        take_buffers_of_first_row(self.model, self.mesh)
        return loss.detach(), norm

    def save(self, step: int) -> None:
        """Write a checkpoint and remove the oldest."""
        output = Path(self.settings.output)
        save_checkpoint(output, self.model, self.optimizer, step=step, state={"settings": self.settings.fixed()})
        if dist.get_rank() == 0:
            remove_older(output, keep=self.settings.keep)

    def mean(self, loss: Tensor) -> float:
        """The mean over the rows of what `step` returns; every process must call this."""
        total = loss.double()
        dist.all_reduce(total, group=self.mesh.get_group(DATA))
        return float(total) / self.mesh[DATA].size()

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.settings.steps

    def _narrowed(self) -> AbstractContextManager[object]:
        if self.settings.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)
