"""The training program under torchrun, on several processes of this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from subquad.models import SubquadForCausalLM, SubquadForMaskedLM
from subquad.parallel.checkpoint import last_checkpoint, load_checkpoint
from subquad.parallel.join import place
from subquad.parallel.settings import Settings
from subquad.parallel.train import REFUSED, build_model, main

ROOT = Path(__file__).parents[2]
SIZES = ["--layers=1", "--width=16", "--heads=2", "--hidden=16", "--length=16", "--batch=4", "--report-every=1"]
EXPERTS = '{"name": "switch", "experts": 4}'
LIMIT_SECONDS = 120.0
NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it torch 2.13 tells workers that start again the addresses of those before."""


def command(output: Path, *options: str, agent: str = "--standalone --nproc-per-node 2") -> list[str]:
    program = ["-m", "subquad.parallel.train", "--output", str(output), "--feedforward", EXPERTS, *SIZES, *options]
    return [sys.executable, "-m", "torch.distributed.run", *agent.split(), *program]


@contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A program whose output is read as it comes; it and its children are gone at the end."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    environment = {**os.environ, **own, **NEW_STORE}
    program = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        yield program
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGTERM)  # torchrun ends its workers
            try:
                program.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(program.pid, signal.SIGKILL)
        assert program.stdout is not None
        program.stdout.close()
        program.wait()


def said_by(program: subprocess.Popen[str], *, limit_seconds: float = LIMIT_SECONDS) -> str:
    """What it says from now to its end."""
    return program.communicate(timeout=limit_seconds)[0]


def wait_for(program: subprocess.Popen[str], text: str) -> None:
    assert program.stdout is not None
    heard = []
    for line in program.stdout:
        heard.append(line)
        if text in line:
            return
    raise AssertionError("".join(heard))


def workers_of(program: subprocess.Popen[str]) -> list[int]:
    """Process ids of torchrun's workers, in the order of their ranks."""
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    return [
        int(child) for child in children if b"subquad.parallel.train" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


@pytest.fixture
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_torchrun")
def test_without_torchrun_it_says_how_to_start(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--output", str(tmp_path)]) == REFUSED
    assert "RANK, LOCAL_RANK, WORLD_SIZE is not set: start the program with torchrun" in capsys.readouterr().err


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], world_size: int, *options: str) -> str:
    """What is said of options before any process is waited for: there is none."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world_size}.items():
        monkeypatch.setenv(name, str(value))
    assert place().world_size == world_size
    assert main([*SIZES, *options]) == REFUSED
    assert not torch.distributed.is_initialized()
    return capsys.readouterr().err


REFUSED_OPTIONS = [
    (4, ["--feedforward", '{"name": "moe", "experts": 6}'], "error: moe: 6 experts can't be shared out evenly among 4"),
    (4, ["--batch", "6"], "error: --batch 6 can't be shared out evenly among 4 data-parallel processes (world size 4"),
    (3, ["--model-parallel", "2"], "error: 3 processes can't be arranged in rows of 2"),
    (4, ["--model-parallel", "4"], "error: full: 2 heads can't be shared out evenly among the 4 processes of a row"),
    (1, ["--text", "no such file"], "error: --text: there is no file no such file"),
    (1, ["--mixer", "fulll"], "error: unknown token mixer 'fulll'"),
]


@pytest.mark.parametrize(("world_size", "options", "message"), REFUSED_OPTIONS)
def test_what_cannot_be_done_is_told_before_any_process_is_waited_for(
    world_size: int,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert message in refusal(monkeypatch, capsys, world_size, "--output", str(tmp_path), *options)


def test_a_run_that_is_there_is_not_written_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "step-00000002").mkdir()
    said = refusal(monkeypatch, capsys, 1, "--output", str(tmp_path))
    assert f"error: {tmp_path} has a run in it already: give --resume to go on, or another --output" in said


def test_the_objective_decides_the_model() -> None:
    assert isinstance(build_model(Settings(layers=1)), SubquadForCausalLM)
    assert isinstance(build_model(Settings(layers=1, objective="masked")), SubquadForMaskedLM)


@pytest.mark.slow
def test_a_run_learns_and_goes_on_on_fewer_processes(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"a text that says the same again and again. " * 20)
    more = ("--learning-rate", "0.02", "--warm-up", "5", "--text", str(text))
    output, four = tmp_path / "run", "--standalone --nproc-per-node 4"
    first = command(output, "--steps", "30", "--model-parallel", "2", "--checkpoint-every", "20", *more, agent=four)
    with started(first) as program:
        said = said_by(program)
        assert program.returncode == 0, said
    assert "2 x 2 processes, steps 0 to 30" in said
    losses = [float(line.split()[3]) for line in said.splitlines() if line.startswith("step ")]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    with started(command(output, "--steps", "32", "--resume", *more)) as program:
        said = said_by(program)
        assert program.returncode == 0, said
    assert "2 x 1 processes, steps 30 to 32" in said
    assert (output / "step-00000032").is_dir()


def assert_last_checkpoint_loads(output: Path) -> None:
    found = last_checkpoint(output)
    assert found is not None
    model = SubquadForCausalLM.from_pretrained(found)
    assert load_checkpoint(found, model)["step"] >= 1


ENDLESS = ("--steps", "1000000", "--checkpoint-every", "1")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_stops_the_others_of_its_machine(victim: int, tmp_path: Path) -> None:
    with started(command(tmp_path, *ENDLESS)) as program:
        wait_for(program, "step 3 ")
        os.kill(workers_of(program)[victim], signal.SIGKILL)
        said = said_by(program, limit_seconds=60)
        assert program.returncode != 0
    assert "SIGKILL" in said or "exitcode  : -9" in said or "exitcode: -9" in said, said
    assert_last_checkpoint_loads(tmp_path)


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again_from_its_last_checkpoint(tmp_path: Path) -> None:
    agent = "--standalone --nproc-per-node 2 --max-restarts 1"
    with started(command(tmp_path, "--steps", "60", "--checkpoint-every", "1", "--resume", agent=agent)) as program:
        wait_for(program, "step 3 ")
        os.kill(workers_of(program)[1], signal.SIGKILL)
        said = said_by(program)
        assert program.returncode == 0, said
    assert "steps 0 to 60" not in said
    assert " to 60" in said
    assert (tmp_path / "step-00000060").is_dir()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])  # the first machine has the store through which processes find one another
def test_a_machine_that_dies_is_noticed_by_the_others(victim: int, tmp_path: Path) -> None:
    port = free_port()
    agents = [
        f"--nnodes 2 --node-rank {rank} --nproc-per-node 1 --master-addr 127.0.0.1 --master-port {port}"
        for rank in range(2)
    ]
    output = tmp_path / "run"
    first, second = (command(output, *ENDLESS, agent=agent) for agent in agents)
    with started(first) as leader, started(second) as follower:
        wait_for(leader, "step 3 ")
        kept, lost = (follower, leader) if victim == 0 else (leader, follower)
        for process in (lost.pid, *workers_of(lost)):
            os.kill(process, signal.SIGKILL)
        said = said_by(kept, limit_seconds=60)
        assert kept.returncode != 0
    assert f"process {1 - victim} of 2 has lost another one" in said
    assert "Start again with --resume to go on from the last checkpoint." in said
    assert_last_checkpoint_loads(output)


@pytest.mark.slow
def test_a_process_that_falls_silent_is_noticed_too(tmp_path: Path) -> None:
    with started(command(tmp_path, *ENDLESS, "--timeout-seconds", "5")) as program:
        wait_for(program, "step 3 ")
        silent = workers_of(program)[1]
        os.kill(silent, signal.SIGSTOP)
        wait_for(program, "process 0 of 2 has lost another one, which ended or said nothing for 5 seconds")
        os.kill(silent, signal.SIGKILL)  # a stopped process can't end itself, as torchrun asks it to
        said = said_by(program, limit_seconds=60)
        assert program.returncode != 0, said
    assert_last_checkpoint_loads(tmp_path)
