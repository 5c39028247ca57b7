import errno
import io
import json
import subprocess
import sys

import pytest
from command_line import Invoke

import subquad
from subquad.cli import verbs
from subquad.cli.console import BAD, progress_console
from subquad.cli.errors import failure_of
from subquad.cli.extras import extra_of_module, optional_packages, required_version

HEAVY = {"torch", "numpy", "pydantic", "plotly", "transformers", "matplotlib"}


def run_process(*arguments: str, program: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program or "import sys; from subquad.cli.main import main; sys.exit(main())"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60)


def test_the_help_names_every_verb_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from subquad.cli.main import main; code = main(['--help']);"
        f"print(sorted({HEAVY} & set(sys.modules)), code)"
    )
    ran = run_process(program=program)
    assert ran.stdout.splitlines()[-1] == "[] 0", ran.stderr
    assert all(f"\n  {verb} " in ran.stdout for verb in verbs.VERBS)


@pytest.mark.parametrize("verb", ["list", "show", "data", "doctor", "report"])
def test_the_help_of_a_verb_does_not_load_torch(verb: str) -> None:
    program = (
        f"import sys; from subquad.cli.main import main; code = main([{verb!r}, '--help']);"
        "print('torch' in sys.modules, code)"
    )
    ran = run_process(program=program)
    assert ran.stdout.splitlines()[-1] == "False 0", ran.stderr


def test_without_arguments_the_help_is_printed(invoke: Invoke) -> None:
    assert invoke() == invoke("--help")
    assert invoke().exit_code == 0


def test_the_version_is_printed(invoke: Invoke) -> None:
    assert invoke("--version").out.strip() == subquad.__version__


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["lst"], "unknown command 'lst'; did you mean 'list'? Known: compare, data, doctor, generate, list, "),
        (["list", "--jsn"], "unknown option --jsn (did you mean --json?); see `subquad list --help`"),
        (["--versio"], "unknown option --versio (did you mean --version?); see `subquad --help`"),
        (["--json"], "unknown option --json "),
        (["show"], "missing argument 'name'; see `subquad show --help`"),
        (["show", "local", "--length", "many"], "invalid value for '--length': "),
        (["list", "extra"], "got unexpected extra argument(s) (extra); see `subquad list --help`"),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_2(arguments: list[str], text: str, invoke: Invoke) -> None:
    ran = invoke(*arguments)
    assert ran.exit_code == 2
    assert ran.out == ""
    assert ran.err.startswith(f"subquad: {text}")
    assert ran.err.count("\n") == 1


def test_an_error_shows_its_traceback_only_when_asked(invoke: Invoke) -> None:
    assert "Traceback" not in invoke("show", "nothing").err
    ran = invoke("show", "nothing", "--traceback")
    assert ran.exit_code == 2
    assert "Traceback" in ran.err
    assert "subquad: unknown token mixer 'nothing'" in ran.err


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise error

    monkeypatch.setattr(verbs, "_load", load)


def test_an_interrupt_says_how_to_continue(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(KeyboardInterrupt(), monkeypatch)
    ran = invoke("list")
    assert ran.exit_code == 130
    assert ran.err.strip() == (
        "subquad: interrupted; what was finished is kept, run the same command again to continue"
    )


def test_a_full_disk_names_the_path(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(OSError(errno.ENOSPC, "No space left on device", "results/x.json"), monkeypatch)
    ran = invoke("list")
    assert ran.exit_code == 2
    assert "cannot write results/x.json: the disk is full. Free some space" in ran.err


def test_a_missing_file_is_named() -> None:
    failure = failure_of(FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"))
    assert failure.text == "cannot use a.txt: No such file or directory."
    assert failure.exit_code == 2


def test_a_missing_package_names_the_extra_that_brings_it(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(ModuleNotFoundError("No module named 'plotly'", name="plotly.offline"), monkeypatch)
    ran = invoke("list")
    assert ran.exit_code == 2
    assert "this command needs plotly: install it with pip install 'subquad[cli]'." in ran.err


def test_without_the_extra_of_the_command_line_the_sentence_is_plain() -> None:
    program = (
        "import sys; sys.modules['rich'] = None; sys.modules['typer'] = None;"
        "from subquad.cli.main import main; sys.exit(main(['list']))"
    )
    ran = run_process(program=program)
    assert ran.returncode == 2
    assert "pip install 'subquad[cli]'" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_mistake_of_ours_is_not_blamed_on_the_user(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(KeyError("window"), monkeypatch)
    ran = invoke("list")
    assert ran.exit_code == 1
    assert "subquad made a mistake (KeyError: 'window'). Run the same command with --traceback" in ran.err


def test_an_import_error_of_a_module_that_no_extra_brings_is_a_mistake() -> None:
    assert failure_of(ModuleNotFoundError("No module named 'nonsense'", name="nonsense")).exit_code == 1


def test_a_closed_pipe_ends_quietly() -> None:
    program = "from subquad.cli.main import main; import sys; sys.exit(main())"
    command = f"{sys.executable} -c '{program}' list --json | true"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert ran.stderr == ""


def test_a_terminal_without_unicode_ends_no_command() -> None:
    program = (
        "import sys, io; sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='ascii');"
        "from subquad.cli.main import main; sys.exit(main(['list', '--family', 'dense']))"
    )
    ran = run_process(program=program)
    assert ran.returncode == 0, ran.stderr
    assert "full" in ran.stdout


def test_no_colour_reaches_a_pipe(invoke: Invoke) -> None:
    assert "\x1b" not in invoke("list").out
    assert "\x1b" not in invoke("nonsense").err


def test_no_color_takes_the_colour_from_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for name, colourless in (("TERM", False), ("NO_COLOR", True)):
        monkeypatch.setenv(name, "xterm-256color")
        console = progress_console()
        console.file = io.StringIO()
        console.print("text", style=BAD)
        assert ("[31m" not in console.file.getvalue()) is colourless


def test_the_extras_are_those_of_the_metadata() -> None:
    packages = optional_packages()
    assert packages["transformers"] == "models"
    assert packages["typer"] == "cli"
    assert packages["pyarrow"] == packages["scikit-learn"] == "data"
    assert "pytest" not in packages
    assert extra_of_module("PIL") == "cli"
    assert extra_of_module("sklearn") == "data"
    assert extra_of_module("nonsense") is None
    assert required_version("torch") == ">=2.13"


def test_main_is_what_the_console_script_runs() -> None:
    ran = run_process("list", "--json")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert {entry["name"] for entry in json.loads(ran.stdout)} >= {"full", "local"}
