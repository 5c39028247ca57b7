"""What happens in the worker stays there, but for its result, its progress and how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from stand_ins import OWN

from subquad.benchmark.mixers import parse_mixer
from subquad.benchmark.worker import Progress, Worker, WorkerDiedError, WorkError
from subquad.registry import MIXERS

PATIENCE_SECONDS = 30.0


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker([f"{OWN}:SoundConfig"]) as worker:
        yield worker


def add(a: int, b: int, progress: Progress) -> int:
    progress(1, 2, "half")
    print("said in the worker")
    return a + b


def process_id(progress: Progress) -> int:
    return os.getpid()


def threads(progress: Progress) -> int:
    return torch.get_num_threads()


def raises(error: type[BaseException], progress: Progress) -> None:
    raise error("out of ideas\nand of words")


def unpicklable(progress: Progress) -> Callable[[], None]:
    return lambda: None


def knows(name: str, progress: Progress) -> bool:
    return name in dict(MIXERS.items())


def interrupts_itself(progress: Progress) -> str:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
    return "still here"


def ends_by(number: int, progress: Progress) -> None:
    os.kill(os.getpid(), number)


def exits(progress: Progress) -> None:
    os._exit(3)


def sleeps(progress: Progress) -> None:
    progress(0, 1, str(os.getpid()))
    time.sleep(600)


def is_alive(process: int) -> bool:
    """Whether it runs; one that has ended and was not waited for doesn't."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_ends(process: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while is_alive(process):
        assert time.monotonic() < deadline, f"process {process} is left behind"
        time.sleep(0.05)


def test_a_call_gives_its_result_and_tells_its_progress(worker: Worker) -> None:
    heard: list[tuple[int, int, str]] = []
    assert worker.call(add, 1, 2, progress=lambda *event: heard.append(event)) == 3
    assert heard == [(1, 2, "half")]
    assert worker.call(add, 3, 4) == 7


@pytest.mark.slow
def test_what_is_printed_in_a_worker_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with Worker() as worker:
        worker.call(add, 1, 2)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "said in the worker" in captured.err
    assert "Traceback" not in captured.err


def test_it_is_another_process_that_stays_and_has_as_many_threads(worker: Worker) -> None:
    first = worker.call(process_id)
    assert first != os.getpid()
    assert worker.call(process_id) == first
    assert worker.call(threads) == torch.get_num_threads()


def test_it_knows_the_users_own_mechanisms(worker: Worker) -> None:
    assert worker.call(knows, "sound")
    assert not worker.call(knows, "unsound")
    assert parse_mixer(f"{OWN}:SoundConfig").config.name == "sound"


@pytest.mark.parametrize("error", [ValueError, SystemExit, MemoryError])
def test_an_error_comes_back_with_its_traceback_and_the_worker_lives(
    worker: Worker, error: type[BaseException]
) -> None:
    process = worker.call(process_id)
    with pytest.raises(WorkError, match="out of ideas\nand of words") as caught:
        worker.call(raises, error)
    assert caught.value.kind == error.__name__
    assert "in raises" in caught.value.details
    assert worker.call(process_id) == process


def test_a_result_that_can_not_be_sent_is_an_error(worker: Worker) -> None:
    with pytest.raises(WorkError, match="pickle"):
        worker.call(unpicklable)


def test_ctrl_c_does_not_reach_it(worker: Worker) -> None:
    assert worker.call(interrupts_itself) == "still here"


def test_a_process_that_ends_is_told_and_the_next_call_has_a_new_one(worker: Worker) -> None:
    first = worker.call(process_id)
    with pytest.raises(WorkerDiedError, match="the process was killed by signal 9") as caught:
        worker.call(ends_by, signal.SIGKILL)
    assert caught.value.out_of_memory
    assert worker.call(process_id) != first


@pytest.mark.slow
def test_another_end_is_no_lack_of_memory() -> None:
    with Worker() as worker:
        for function, arguments, message in (
            (ends_by, (signal.SIGSEGV,), "the process was killed by signal 11"),
            (exits, (), "the process ended with 3"),
        ):
            with pytest.raises(WorkerDiedError, match=message) as caught:
                worker.call(function, *arguments)
            assert not caught.value.out_of_memory


class LeftError(Exception):
    pass


def test_leaving_ends_the_process_in_the_middle_of_its_work() -> None:
    processes: list[int] = []

    def leave(done: int, total: int, note: str) -> None:
        processes.append(int(note))
        raise LeftError

    with pytest.raises(LeftError), Worker() as worker:
        worker.call(sleeps, progress=leave)
    assert_ends(processes[0])


PARENT = """
import os, sys
sys.path.insert(0, sys.argv[1])
import test_worker
from subquad.benchmark.worker import Worker

if __name__ == "__main__":
    with Worker() as worker:
        worker.call(test_worker.sleeps, progress=lambda done, total, note: print(note, flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_parent_is_killed_the_worker_ends_in_the_middle_of_its_work(tmp_path: Path, number: int) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        process = int(parent.stdout.readline())
        assert is_alive(process)
        parent.send_signal(number)
        parent.wait(PATIENCE_SECONDS)
        assert_ends(process)
