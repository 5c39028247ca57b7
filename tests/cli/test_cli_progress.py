import io

import pytest
from rich.console import Console

from subquad.cli.progress import Progress


def plain() -> Console:
    return Console(file=io.StringIO(), width=80)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_work_is_a_line_at_its_start_and_one_at_its_end() -> None:
    console = plain()
    with Progress(console) as bars:
        bar = bars.start("train local, seed 0", total=600)
        bar.update(300, note="validation 41.2 %")
        bars.say("linear: recorded already")
        bar.finish("test 43.0 %")
    first, said, last = written(console).splitlines()
    assert first == "train local, seed 0 ..."
    assert said == "  linear: recorded already"
    assert last.startswith("✓ train local, seed 0  ")
    assert last.endswith("s  test 43.0 %")


def test_on_a_terminal_a_bar_moves_and_becomes_a_line() -> None:
    console = terminal()
    with Progress(console) as bars:
        bar = bars.start("train local, seed 0")
        bar.update(150, total=600, note="validation 41.2 %")
        assert bars._live is not None
        bars._live.refresh()
        drawn = written(console)
        bar.finish("test 43.0 %")
    assert " 25 %" in drawn
    assert "validation 41.2 %" in drawn
    assert "✓ train local, seed 0 " in written(console)
    assert "test 43.0 %" in written(console)


def test_a_note_stays_until_another_one_comes() -> None:
    console = terminal()
    with Progress(console) as bars:
        bar = bars.start("prove", total=3)
        bar.update(1, note="causal")
        bar.update(2)
        assert bars._live is not None
        assert bars._live.tasks[0].fields["note"] == "causal"
        bar.finish()


@pytest.mark.parametrize("console", [plain(), terminal()], ids=["plain", "terminal"])
@pytest.mark.parametrize(("error", "note"), [(KeyboardInterrupt, "interrupted"), (ValueError, "failed")])
def test_what_was_running_when_the_command_ended_is_named(
    console: Console, error: type[BaseException], note: str
) -> None:
    def work() -> None:
        with Progress(console) as bars:
            bars.start("train local, seed 0", total=10)
            raise error

    with pytest.raises(error):
        work()
    assert any("✗ train local, seed 0" in line and note in line for line in written(console).splitlines())


def test_a_second_finish_changes_nothing() -> None:
    console = plain()
    with Progress(console) as bars:
        bar = bars.start("prove")
        bar.finish("12 of 12", failed=False)
        bar.finish("again", failed=True)
    assert "again" not in written(console)


def test_brackets_in_names_are_no_markup() -> None:
    console = plain()
    with Progress(console) as bars:
        bars.start("lists [red]").finish("[bold]done[/bold]")
    assert "lists [red] ..." in written(console)
    assert "[bold]done[/bold]" in written(console)
