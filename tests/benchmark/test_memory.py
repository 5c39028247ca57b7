import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from subquad.benchmark import memory
from subquad.benchmark.memory import PeakMemory, allocated_peak_bytes, saved_bytes
from subquad.benchmark.worker import start_process

MEBIBYTE = 2**20


def test_a_storage_is_counted_once_and_parameters_are_not() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8))
    x = torch.randn(4, 8, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x @ weight  # keeps x and the parameter
        return y * y  # keeps y twice

    assert saved_bytes(forward, [weight]) == 4 * (x.numel() + 4 * 8)
    assert saved_bytes(forward, []) == 4 * (x.numel() + 4 * 8 + weight.numel())


def test_views_of_one_storage_are_one() -> None:
    whole = torch.randn(10, 8, requires_grad=True)
    assert saved_bytes(lambda: whole[:5] * whole[5:], []) == 4 * whole.numel()


def test_without_gradients_nothing_is_kept() -> None:
    x = torch.randn(8, requires_grad=True)
    with torch.no_grad():
        assert saved_bytes(lambda: x * x, []) == 0


def test_what_was_held_at_once_is_counted_and_not_what_was_held_in_turn() -> None:
    def in_turn() -> None:
        for _ in range(4):
            torch.ones(MEBIBYTE // 4)

    def at_once() -> list[torch.Tensor]:
        return [torch.ones(MEBIBYTE // 4) for _ in range(4)]

    assert MEBIBYTE <= allocated_peak_bytes(in_turn) < 2 * MEBIBYTE
    assert 4 * MEBIBYTE <= allocated_peak_bytes(at_once) < 5 * MEBIBYTE
    assert allocated_peak_bytes(lambda: None) == 0


def allocate(connection: Connection) -> None:
    peak = PeakMemory()
    torch.ones(64 * MEBIBYTE // 4)
    first = peak.bytes()
    peak.restart()
    torch.ones(MEBIBYTE // 4)
    connection.send((first, peak.bytes()))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system doesn't tell a process's peak")
def test_the_peak_of_a_fresh_process_is_what_it_allocated_since_the_restart() -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = start_process(allocate, sender)
    sender.close()
    first, second = receiver.recv()
    process.join()
    assert 64 * MEBIBYTE <= first < 96 * MEBIBYTE
    assert second < 32 * MEBIBYTE


def test_where_the_system_does_not_tell_the_peak_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "Path", lambda path: Path("/nowhere") / path.lstrip("/"))
    peak = PeakMemory()
    peak.restart()
    assert peak.bytes() is None
