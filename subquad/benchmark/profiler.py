"""Speed and memory of mixers against length, always beside fused dense attention in the same run.

What is timed is a whole mixer with its projections, as a model would call it: forward (no gradients) and forward plus
backward (gradients of input and parameters, a fixed random gradient from above). All mixers and dense attention take
turns, sample by sample. Dense is the mechanism `full`, in the same form.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from subquad.benchmark.allocator import freed_memory_kept
from subquad.benchmark.memory import PeakMemory, saved_bytes
from subquad.benchmark.mixers import parse_mixer
from subquad.benchmark.timing import interleaved_seconds
from subquad.benchmark.worker import become_worker, start_process
from subquad.build import build_from_config, check_dims, make_dims, mixer_config
from subquad.costs import Cost
from subquad.interface import Dims, MixerConfig, TokenMixer
from subquad.receipt import Receipt, receipts
from subquad.records.conventions import DENSE
from subquad.records.schema import CostRecord, ProfilePoint, ReceiptRecord, Timing
from subquad.training.presets import ProfileSettings


@dataclass(frozen=True)
class Measured:
    """One mixer at one length.

    Attributes:
        forward: seconds, one sample per round.
        forward_backward: seconds, one sample per round.
        saved_bytes: what autograd keeps.
        cost: the analytic price.
        receipts: what one pass without gradients and one with them leave; the counts are of these two.
    """

    forward: list[float]
    forward_backward: list[float]
    saved_bytes: int
    cost: Cost
    receipts: tuple[Receipt, ...]


def profile_dims(config: MixerConfig, settings: ProfileSettings, *, causal: bool = False) -> Dims:
    """The dims that a mixer is profiled with; a mechanism that is only causal is profiled causally.

    Raises:
        ValueError: the mechanism can't do that.
    """
    dims = make_dims(
        embed_dim=settings.embed_dim,
        num_heads=settings.num_heads,
        causal=causal or not config.traits.bidirectional,
        max_length=max(settings.lengths),
    )
    check_dims(config, dims)
    return dims


def measure_length(
    mixers: Sequence[MixerConfig], settings: ProfileSettings, length: int, *, causal: bool = False
) -> tuple[list[Measured], list[Measured]]:
    """Measure all mixers at one length, by turns with dense attention in each form that occurs; freed memory is kept.

    Returns:
        For each mixer its figures, and those of dense attention in the same form.
    """
    forms = [profile_dims(config, settings, causal=causal) for config in mixers]
    dense = mixer_config(DENSE)
    subjects = [_Subject(config, dims, settings, length) for config, dims in zip(mixers, forms, strict=True)]
    dense_subjects = {dims.causal: _Subject(dense, dims, settings, length) for dims in forms}
    everyone = [*subjects, *dense_subjects.values()]
    with freed_memory_kept():
        forward = interleaved_seconds({str(i): s.forward for i, s in enumerate(everyone)}, rounds=settings.rounds)
        both = interleaved_seconds({str(i): s.forward_backward for i, s in enumerate(everyone)}, rounds=settings.rounds)
    measured = [subject.measured(forward[str(i)], both[str(i)]) for i, subject in enumerate(everyone)]
    dense_measured = dict(zip(dense_subjects, measured[len(subjects) :], strict=True))
    return measured[: len(subjects)], [dense_measured[dims.causal] for dims in forms]


def profile_point(
    length: int, mixer: Measured, dense: Measured, peak: int | None, dense_peak: int | None
) -> ProfilePoint:
    """The record of a length."""
    return ProfilePoint(
        length=length,
        forward=Timing(samples_seconds=tuple(mixer.forward)),
        forward_backward=Timing(samples_seconds=tuple(mixer.forward_backward)),
        dense_forward=Timing(samples_seconds=tuple(dense.forward)),
        dense_forward_backward=Timing(samples_seconds=tuple(dense.forward_backward)),
        saved_bytes=mixer.saved_bytes,
        dense_saved_bytes=dense.saved_bytes,
        peak_bytes=peak,
        dense_peak_bytes=dense_peak,
        cost=cost_record(mixer.cost),
        dense_cost=cost_record(dense.cost),
    )


def cost_record(cost: Cost) -> CostRecord:
    """A price, as records keep it."""
    return CostRecord(
        flops=cost.flops,
        activation_bytes=cost.activation_bytes,
        state_bytes=cost.state_bytes,
        parameters=cost.parameters,
    )


def receipt_record(receipt: Receipt) -> ReceiptRecord:
    """A receipt, as records keep it."""
    return ReceiptRecord(
        where=receipt.where, asked=receipt.asked, ran=receipt.ran, reason=receipt.reason, count=receipt.count
    )


def peak_bytes_in_fresh_process(text: str, settings: ProfileSettings, *, causal: bool = False) -> dict[int, int]:
    """Peak memory of forward plus backward at each length, taken in a process that does nothing else.

    Lengths are measured in rising order, so that what the allocator keeps from one helps no shorter one.

    Args:
        text: the mixer, as `parse_mixer` reads it.
        settings: lengths and sizes.
        causal: the form.

    Returns:
        Bytes by length; lengths that the process did not survive, or whose peak the system doesn't tell, are missing.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = start_process(_send_peaks, sender, text, settings, causal, torch.get_num_threads())
    sender.close()
    peaks: dict[int, int] = {}
    try:
        while True:
            length, peak = receiver.recv()
            peaks[length] = peak
    except EOFError:
        process.join()
    finally:
        process.kill()
    return peaks


def _send_peaks(sender: Connection, text: str, settings: ProfileSettings, causal: bool, threads: int) -> None:
    become_worker(threads)
    torch.manual_seed(0)
    config = parse_mixer(text).config
    dims = profile_dims(config, settings, causal=causal)
    memory = PeakMemory()
    for length in settings.lengths:
        try:
            subject = _Subject(config, dims, settings, length)
            memory.restart()
            subject.forward_backward()
        except Exception:  # why is told by the measurement of speed, which meets the same; here a length is missing
            return
        peak = memory.bytes()
        if peak is not None:
            sender.send((length, peak))


class _Subject:
    """A mixer with input and upstream gradient, ready to be run."""

    def __init__(self, config: MixerConfig, dims: Dims, settings: ProfileSettings, length: int) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dims, self.length, self.batch_size = dims, length, settings.batch_size
        self.mixer: TokenMixer = build_from_config(config, dims).to(device)
        shape = (settings.batch_size, length, settings.embed_dim)
        generator = torch.Generator().manual_seed(0)
        self.x: Tensor = torch.randn(shape, generator=generator).to(device).requires_grad_()
        self.upstream: Tensor = torch.randn(shape, generator=generator).to(device)

    def forward(self) -> Any:
        with torch.no_grad():
            return self.mixer(self.x).y

    def forward_backward(self) -> None:
        self.x.grad = None
        self.mixer.zero_grad(set_to_none=True)
        self.mixer(self.x).y.backward(self.upstream)

    def measured(self, forward: list[float], forward_backward: list[float]) -> Measured:
        """These samples, and what needs no clock: receipts are collected here, where nothing is timed."""
        price = self.batch_size * self.mixer.config.cost(self.dims, self.length, self.x.element_size())
        with receipts() as collected:
            self.forward()
            kept = saved_bytes(lambda: self.mixer(self.x).y, self.mixer.parameters())
        return Measured(forward, forward_backward, kept, price, tuple(collected.entries))
