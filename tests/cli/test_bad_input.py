"""Whatever is wrong with the input or befalls a command: one sentence, an exit code, nothing lost or left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Invoke, Ran

from subquad.tasks.registry import load_task
from subquad.training.presets import load_preset

PRESETS = Path(__file__).parents[1] / "presets"
TINY = str(PRESETS / "tiny.toml")
UNPROVED = f"{Path(__file__).parent / 'unproved.py'}:UnprovedConfig"
PATIENCE_SECONDS = 60.0


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    load_task("listops").prepare(directory, load_preset("listops", TINY).data)
    return directory


@pytest.fixture
def own_data(tiny_files: Path, tmp_path: Path) -> Path:
    """Data of the user's own, to be damaged."""
    directory = tmp_path / "own"
    directory.mkdir()
    for path in tiny_files.glob("*.tsv"):
        shutil.copy(path, directory)
    return directory


def assert_one_sentence(ran: Ran, *texts: str, exit_code: int = 2) -> None:
    """The last line says what is wrong; before it there are at most lines of progress."""
    assert ran.exit_code == exit_code, ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err
    last = ran.err.splitlines()[-1]
    assert last.startswith("subquad: ")
    assert ran.err.count("subquad: ") == 1
    assert "made a mistake" not in last
    for text in texts:
        assert text in last


OPTIONS: list[tuple[list[str], list[str]]] = [
    (["compare", "--task", "listop"], ["unknown task 'listop'", "did you mean 'listops'"]),
    (["compare", "--preset", "quik"], ["unknown preset 'quik'", "did you mean 'quick'"]),
    (["compare", "--preset", "./nowhere.toml"], ["nowhere.toml: there is no such preset file"]),
    (["compare", "--mixers", "full,locl"], ["unknown token mixer 'locl'", "did you mean 'local'"]),
    (["compare", "--mixers", "local:windw=9"], ["unknown option 'windw'", "did you mean 'window'"]),
    (["compare", "--mixers", "local:window=64"], ["63 or 65"]),
    (["compare", "--mixers", "local:window=x"], ["option 'window' must be int, got 'x'"]),
    (["compare", "--mixers", ","], ["expected mixers separated by commas"]),
    (["compare", "--mixers", "./nowhere.py:MyConfig"], ["nowhere.py: no such file"]),
    (["compare", "--mixers", UNPROVED.replace("Unp", "Ump")], ["unproved.py: no class", "'UnprovedConfig'"]),
    (["compare", "--seeds", "0"], ["invalid value for '--seeds'"]),
    (["compare", "--seeds", "many"], ["invalid value for '--seeds'"]),
    (["compare", "--seed", "-1"], ["invalid value for '--seed'"]),
    (["compare", "--mixer", "full"], ["unknown option --mixer (did you mean --mixers?)"]),
    (["compare", "--data", "nowhere"], ["no ListOps data in nowhere"]),
    (
        ["compare", "--preset", "quick:learning_rat=1"],
        ["unknown option 'learning_rat'", "did you mean 'learning_rate'"],
    ),
    (["compare", "--preset", "quick:batch_size=0"], ["[training]: batch_size must be at least 1, got 0"]),
    (["sweep"], ["missing option '--grid'"]),
    (["sweep", "--grid", "learning_rat=1"], ["unknown training setting", "did you mean 'learning_rate'"]),
    (["sweep", "--grid", "learning_rate=x"], ["option 'learning_rate' must be float, got 'x'"]),
    (["sweep", "--mixers", "local", "--grid", "local.window=5,9"], ["equally many trials, got full 1, local 2"]),
    (["sweep", "--mixers", "local", "--grid", "local.window=8", "--grid", "steps=80"], ["7 or 9"]),
    (["run"], ["missing option '--mixer'"]),
    (["run", "--mixer", "full,linear"], ["unknown token mixer", "full,linear"]),
    (["run", "--mixer", "full,linear"], ["one run trains one mechanism", "subquad compare --mixers full,linear"]),
    (["run", "--mixer", "local:window=9,full"], ["for several: subquad compare --mixers local:window=9,full"]),
    (["run", "--mixer", "linformer:rank=0"], ["rank"]),
    (["list", "--trait", "casual"], ["unknown trait 'casual'", "did you mean 'causal'"]),
    (["show", "locl"], ["unknown token mixer 'locl'", "did you mean 'local'"]),
    (["comprae"], ["unknown command 'comprae'", "did you mean 'compare'"]),
]


@pytest.mark.parametrize(
    ("arguments", "texts"),
    OPTIONS,
    ids=[f"{index}-{' '.join(arguments)[:60]}" for index, (arguments, _) in enumerate(OPTIONS)],
)
def test_a_wrong_option_names_the_nearest_right_one(
    arguments: list[str], texts: list[str], invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(invoke(*arguments), *texts)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("[model]", "[model", "line 10"),
        ("steps = 24", "steps = 25", "steps=25 must be a multiple of evaluate_every=8"),
        ("steps = 24", "stepz = 24", "unknown option 'stepz'; did you mean 'steps'?"),
        ("[profile]", "[profiles]", "expected the tables"),
        ("generator = {", "generator = { depth = 3,", "generator must have the keys"),
    ],
)
def test_a_wrong_preset_file_is_named(old: str, new: str, text: str, invoke: Invoke, tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text(Path(TINY).read_text().replace(old, new))
    ran = invoke("compare", "--mixers", "full", "--preset", str(preset), "--output", str(tmp_path / "out"))
    assert_one_sentence(ran, "mine", text)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"( [MAX 2 ) 3 ]\t9\t1\r\n", "expected one tab"),
        (b"( ( [MAX 2 ) 3 ] )\tnine\r\n", "expected one digit from 0 to 9 after the tab, got"),
        (b"( ( [MAX 2 ) 3 ] )\t10\r\n", "expected one digit from 0 to 9 after the tab, got"),
        (b"( ( [MAX 2 ) 3 ]\t3\r\n", "balanced"),
        (b"\xff\xfe\t3\r\n", "UTF-8"),
        (b"\t3\r\n", "expected an expression"),
        (b"( ( [MAX " + b"2 " * 30 + b") ] )\t2\r\n", "expected at most 24 tokens"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(
    own_data: Path, line: bytes, text: str, invoke: Invoke, tmp_path: Path
) -> None:
    path = own_data / "basic_val.tsv"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:5], line, *lines[5:]]))
    options = ["--preset", TINY, "--data", str(own_data), "--output", str(tmp_path / "out")]
    assert_one_sentence(invoke("compare", "--mixers", "full", *options), "basic_val.tsv, line 6: ", text)


def test_an_empty_or_missing_file_is_named(own_data: Path, invoke: Invoke, tmp_path: Path) -> None:
    options = ["--mixers", "full", "--preset", TINY, "--data", str(own_data), "--output", str(tmp_path / "out")]
    (own_data / "basic_test.tsv").write_bytes(b"")
    assert_one_sentence(invoke("compare", *options), "basic_test.tsv")
    (own_data / "basic_test.tsv").unlink()
    assert_one_sentence(invoke("compare", *options), "lacks basic_test.tsv")


@pytest.mark.parametrize("verb", ["compare", "run", "profile"])
def test_an_output_that_can_not_be_written_is_told_before_any_work(verb: str, invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    named = ["--mixer" if verb == "run" else "--mixers", "full"]
    for output in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        assert_one_sentence(invoke(verb, *named, "--output", str(output)), f"cannot write {output}", "--output")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("class MyConfig(\n", "mine.py: running the file failed: SyntaxError"),
        ("", "mine.py: no class 'MyConfig'"),
        ("1 / 0", "mine.py: running the file failed: ZeroDivisionError"),
    ],
)
def test_a_broken_file_of_the_users_own_is_named(code: str, text: str, invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(code)
    assert_one_sentence(invoke("run", "--mixer", f"{tmp_path / 'mine.py'}:MyConfig"), text)


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("subquad")), *arguments]


def run(*arguments: str) -> Ran:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=180, env=environment)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


@pytest.fixture
def commands_hear_interrupts() -> Iterator[None]:
    """A shell that runs the tests in the background makes them, and what they start, ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*arguments: str) -> subprocess.Popen[str]:
    """A command in its own process group, as a shell starts it."""
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def living(group: int) -> list[int]:
    """Processes of a group that run; those that have ended and were not waited for don't."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(process_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for_line(process: subprocess.Popen[str], beginning: str) -> list[str]:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(beginning):
            return lines
    raise AssertionError("".join(lines))


def assert_none_is_left(group: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while left := living(group):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.usefixtures("commands_hear_interrupts")
def test_an_interrupted_or_killed_comparison_leaves_nothing_behind_and_is_completed(tmp_path: Path) -> None:
    options = ["compare", "--preset", TINY, "--output", str(tmp_path), "--mixers", f"{UNPROVED}:seconds=0.3", "--json"]
    with start(*options) as early:
        lines = wait_for_line(early, f"prove {UNPROVED.rpartition(':')[0]}"[:6])  # the worker is still starting
        os.killpg(early.pid, signal.SIGINT)
        out, err = early.communicate(timeout=PATIENCE_SECONDS)
        assert_one_sentence(Ran(early.returncode, out, "".join(lines) + err), "interrupted", exit_code=130)
        assert_none_is_left(early.pid)
    with start(*options) as interrupted:
        lines = wait_for_line(interrupted, f"train {UNPROVED}")
        time.sleep(1)
        os.killpg(interrupted.pid, signal.SIGINT)
        out, err = interrupted.communicate(timeout=PATIENCE_SECONDS)
        ran = Ran(interrupted.returncode, out, "".join(lines) + err)
        assert_one_sentence(ran, "interrupted", "run the same command again to continue", exit_code=130)
        assert_none_is_left(interrupted.pid)
    with start(*options) as killed:
        wait_for_line(killed, f"train {UNPROVED}")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not list(tmp_path.rglob("checkpoint-*/trainer_state.json")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        killed.kill()
        killed.communicate()
        assert_none_is_left(killed.pid)
    finished = run(*options)
    assert finished.exit_code == 0, finished.err
    assert "full, seed 0: recorded already" in finished.err
    rows = finished.document["comparisons"][0]["rows"]
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert len(list(tmp_path.rglob("seed-*.json"))) == 3
    assert len(list(tmp_path.glob("*/profile/*.json"))) == 2
    assert not list(tmp_path.rglob("checkpoint-*"))
    assert "the file is run" in finished.err
    (record,) = (path for path in tmp_path.rglob("seed-0.json") if "unproved" in str(path))
    assert json.loads(record.read_text())["train_seconds"] > 24 * 0.3  # of all sittings


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("only root can mount a file system")
    ran = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if ran.returncode:
        pytest.skip(f"a file system can't be mounted here: {ran.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_while_generating_data_is_told(small_disk: Path, tmp_path: Path) -> None:
    preset = tmp_path / "large.toml"
    preset.write_text(Path(TINY).read_text().replace("train = 200", "train = 30_000"))
    ran = run("compare", "--preset", str(preset), "--mixers", "full", "--output", str(small_disk))
    assert_one_sentence(ran, "cannot write ListOps data", "No space left on device")


@pytest.mark.slow
def test_a_full_disk_while_writing_a_checkpoint_is_told_and_the_run_goes_on_when_there_is_space(
    small_disk: Path, tmp_path: Path
) -> None:
    preset = tmp_path / "wide.toml"
    text = Path(TINY).read_text()
    preset.write_text(text.replace("intermediate_size = 16", "intermediate_size = 4000"))
    options = ["run", "--preset", str(preset), "--mixer", UNPROVED, "--output", str(small_disk)]
    ran = run(*options)
    assert_one_sentence(ran, "a checkpoint can't be written", "free some space")
    assert not [path for path in small_disk.rglob("seed-0.json") if "unproved" in str(path)]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = run(*options)
    assert again.exit_code == 0, again.err
    (record,) = (path for path in small_disk.rglob("seed-0.json") if "unproved" in str(path))
    assert json.loads(record.read_text())["status"] == "ok"
