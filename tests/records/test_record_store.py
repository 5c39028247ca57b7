import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad.records.atomic import OutputError, write_atomically
from subquad.records.mechanisms import Mechanisms
from subquad.records.schema import ProfileRecord, RunRecord
from subquad.records.store import (
    path_of_profile,
    path_of_run,
    read_all,
    read_mechanisms,
    read_profile,
    read_run,
    run_path,
    slug,
    write_mechanisms,
    write_profile,
    write_run,
)

MakeRun = Callable[..., RunRecord]
MakeProfile = Callable[..., ProfileRecord]


def test_a_run_lies_where_the_design_says_and_is_read_back(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run("local", 3)
    path = write_run(tmp_path, run)
    folder = path.parent.relative_to(tmp_path)
    assert folder.parts[:3] == ("test-cpu-2-threads", "copying@abc123", "quick")
    assert folder.name.startswith("local-")
    assert path.name == "seed-3.json"
    assert read_run(path) == run
    assert path == run_path(
        tmp_path,
        hardware="test-cpu-2-threads",
        task=run.task,
        preset="quick",
        mixer=run.mixer,
        model=run.model,
        budget=run.budget,
        seed=3,
    )


def test_a_profile_lies_where_the_design_says_and_is_read_back(tmp_path: Path, make_profile: MakeProfile) -> None:
    profile = make_profile("local", {256: (2, 1)})
    path = write_profile(tmp_path, profile)
    assert path.parent == tmp_path / "test-cpu-2-threads" / "profile"
    assert path == path_of_profile(tmp_path, profile)
    assert read_profile(path) == profile


def test_mechanisms_are_read_back_and_may_be_replaced(tmp_path: Path) -> None:
    write_mechanisms(tmp_path, Mechanisms())
    assert read_mechanisms(write_mechanisms(tmp_path, Mechanisms())) == Mechanisms()


def test_the_order_of_options_does_not_change_the_path_and_their_values_do(tmp_path: Path, make_run: MakeRun) -> None:
    one = make_run(mixer={"name": "local", "window": 129, "block": 64})
    other = make_run(mixer={"name": "local", "block": 64, "window": 129})
    third = make_run(mixer={"name": "local", "block": 64, "window": 131})
    assert path_of_run(tmp_path, one) == path_of_run(tmp_path, other) != path_of_run(tmp_path, third)


@given(st.text())
def test_no_name_leaves_its_folder(name: str) -> None:
    assert Path(slug(name)).parts == (slug(name),)
    assert not slug(name).startswith(".")


def test_an_existing_record_is_kept_unless_forced(tmp_path: Path, make_run: MakeRun) -> None:
    path = write_run(tmp_path, make_run(accuracy=0.5))
    with pytest.raises(ValueError, match=r"already exists at .*seed-0\.json; it is kept\. Pass --force"):
        write_run(tmp_path, make_run(accuracy=0.75))
    assert read_run(path) == make_run(accuracy=0.5)
    write_run(tmp_path, make_run(accuracy=0.75), force=True)
    assert read_run(path) == make_run(accuracy=0.75)


class Killed(BaseException):
    """Stands for a process that ends here."""


def test_a_kill_between_write_and_rename_leaves_the_old_record(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run(tmp_path, make_run(accuracy=0.5))

    def die(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(Killed):
        write_run(tmp_path, make_run(accuracy=0.75), force=True)
    assert len(list(path.parent.iterdir())) == 2
    assert read_all(tmp_path).runs == (make_run(accuracy=0.5),)
    assert read_all(tmp_path).unreadable == ()


def test_a_full_disk_is_named_and_leaves_the_old_record_and_no_rubbish(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run(tmp_path, make_run(accuracy=0.5))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"cannot write .*seed-0\.json: No space left on device\. Free some space"):
        write_run(tmp_path, make_run(accuracy=0.75), force=True)
    assert list(path.parent.iterdir()) == [path]
    assert read_run(path) == make_run(accuracy=0.5)


def test_an_output_that_is_no_folder_is_named(tmp_path: Path, make_run: MakeRun) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file.*: Not a directory"):
        write_run(blocked, make_run())


def test_the_file_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    write_atomically(tmp_path / "a", "text")
    assert events == ["sync", "rename", "sync"]


def _damage(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_truncated_record_is_named(tmp_path: Path, make_run: MakeRun) -> None:
    path = write_run(tmp_path, make_run())
    _damage(path, path.read_text()[:100])
    with pytest.raises(ValueError, match=r"seed-0\.json is corrupted or truncated: .*Delete it and run the same"):
        read_run(path)


def test_a_record_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "seed-0.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"seed-0\.json is corrupted or truncated"):
        read_run(path)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*seed-0\.json: No such file"):
        read_run(tmp_path / "seed-0.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, r"written by a newer subquad \(schema version 2, this one reads 1\)\. Upgrade subquad"),
        ({"schema_version": 0}, r"written by an older subquad \(schema version 0, .*again with --force"),
        ({"schema_version": "1"}, "corrupted: a JSON record with a schema_version was expected"),
        ({"steps": -1}, r"not a valid record \(field steps: .*Delete it"),
    ],
)
def test_another_version_or_a_wrong_field_is_explained(
    tmp_path: Path, make_run: MakeRun, change: dict[str, object], message: str
) -> None:
    path = write_run(tmp_path, make_run())
    _damage(path, json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        read_run(path)


@pytest.mark.parametrize("text", ["[]", "1", "null", "{}"])
def test_json_that_is_no_record_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="a JSON record with a schema_version was expected"):
        read_run(_damage(tmp_path / "seed-0.json", text))


def test_json_nested_without_end_is_an_error_and_no_crash(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="corrupted"):
        read_run(_damage(tmp_path / "seed-0.json", "[" * 100_000))


def test_one_bad_file_does_not_hide_the_rest(tmp_path: Path, make_run: MakeRun, make_profile: MakeProfile) -> None:
    write_run(tmp_path, make_run(seed=0))
    bad = _damage(write_run(tmp_path, make_run(seed=1)), "{")
    write_run(tmp_path, make_run(seed=2))
    write_profile(tmp_path, make_profile("local", {256: (2, 1)}))
    _damage(tmp_path / "mechanisms.json", "[]")
    records = read_all(tmp_path)
    assert [run.seed for run in records.runs] == [0, 2]
    assert len(records.profiles) == 1
    assert [file.path for file in records.unreadable] == [bad, tmp_path / "mechanisms.json"]
    assert "corrupted" in records.unreadable[0].reason


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere; run `subquad compare` first"):
        read_all(tmp_path / "nowhere")
