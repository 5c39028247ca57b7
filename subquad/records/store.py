"""The folder of records: where a record lies, how it is written so that a crash harms nothing, how it is read back.

    <output>/<hardware>/<task>@<data hash>/<preset>/<mixer>-<run hash>/seed-<n>.json
    <output>/<hardware>/<task>@<data hash>/<preset>/sweep-<hash of its trials>.json
    <output>/<hardware>/profile/<mixer>-<profile hash>.json
    <output>/mechanisms.json

A record is written to a temporary file, synced and renamed; an existing one is never replaced unless that is asked for,
which is how an interrupted comparison continues. Reading executes nothing: JSON in, validated models out.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import JsonValue, ValidationError

from subquad.records.atomic import write_atomically
from subquad.records.mechanisms import MECHANISMS_FILE, Mechanism, Mechanisms
from subquad.records.schema import SCHEMA_VERSION, Budget, ProfileRecord, RunRecord, TaskInfo
from subquad.records.strict import Strict
from subquad.records.sweeps import SweepRecord

Model = TypeVar("Model", bound=Strict)


@dataclass(frozen=True)
class Unreadable:
    """A file that should be a record and is not, with the reason."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Records:
    """Everything found in an output folder, in the order of the paths."""

    runs: tuple[RunRecord, ...] = ()
    profiles: tuple[ProfileRecord, ...] = ()
    mechanisms: tuple[Mechanism, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    sweeps: tuple[SweepRecord, ...] = ()


def slug(text: str) -> str:
    """Return `text` as one path component, never empty: lower case letters, digits, dots, underscores, hyphens."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-._")[:80].rstrip("-._") or "unnamed"


def canonical_hash(*values: JsonValue) -> str:
    """Return the first 10 hexadecimal digits of the SHA-256 of the values' canonical JSON (keys sorted, no spaces)."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def run_hash(*, mixer: dict[str, JsonValue], model: dict[str, JsonValue], preset: str, budget: Budget) -> str:
    """Return what identifies a training set-up: mixer, model, preset, budget and schema version, without the seed."""
    return canonical_hash(mixer, model, preset, budget.model_dump(), SCHEMA_VERSION)


def run_path(
    output: Path,
    *,
    hardware: str,
    task: TaskInfo,
    preset: str,
    mixer: dict[str, JsonValue],
    model: dict[str, JsonValue],
    budget: Budget,
    seed: int,
) -> Path:
    """Return where the record of a run lies; needs no record, so that a comparison can see what is already done."""
    folder = f"{slug(str(mixer['name']))}-{run_hash(mixer=mixer, model=model, preset=preset, budget=budget)}"
    return output / hardware / f"{task.name}@{task.data_hash}" / preset / folder / f"seed-{seed}.json"


def profile_path(
    output: Path,
    *,
    hardware: str,
    mixer: dict[str, JsonValue],
    embed_dim: int,
    num_heads: int,
    batch_size: int,
    dtype: str,
    causal: bool,
) -> Path:
    """Return where the profile of a mixer lies; the measured lengths are not part of its identity."""
    identity = canonical_hash(mixer, embed_dim, num_heads, batch_size, dtype, causal, SCHEMA_VERSION)
    return output / hardware / "profile" / f"{slug(str(mixer['name']))}-{identity}.json"


def path_of_sweep(output: Path, record: SweepRecord) -> Path:
    """Return where `record` lies in `output`: the same trials lie in the same place."""
    tried: list[JsonValue] = [[each.varied, each.mixer] for tuned in record.mechanisms for each in tuned.trials]
    tried.sort(key=canonical_hash)  # mechanisms stand by their scores
    name = f"sweep-{canonical_hash(tried, list(record.seeds), record.preset, SCHEMA_VERSION)}.json"
    return output / record.hardware / f"{record.task.name}@{record.task.data_hash}" / record.preset_name / name


def path_of_run(output: Path, record: RunRecord) -> Path:
    """Return where `record` lies in `output`."""
    return run_path(
        output,
        hardware=record.environment.hardware,
        task=record.task,
        preset=record.preset,
        mixer=record.mixer,
        model=record.model,
        budget=record.budget,
        seed=record.seed,
    )


def path_of_profile(output: Path, record: ProfileRecord) -> Path:
    """Return where `record` lies in `output`."""
    return profile_path(
        output,
        hardware=record.environment.hardware,
        mixer=record.mixer,
        embed_dim=record.embed_dim,
        num_heads=record.num_heads,
        batch_size=record.batch_size,
        dtype=record.dtype,
        causal=record.causal,
    )


def write_run(output: Path, record: RunRecord, *, force: bool = False) -> Path:
    """Write a run and return its path.

    Raises:
        ValueError: the record exists and `force` is False.
        OutputError: the folder can't be written, or the disk is full.
    """
    return _write_record(path_of_run(output, record), record, force=force)


def write_profile(output: Path, record: ProfileRecord, *, force: bool = False) -> Path:
    """Write a profile and return its path; raises as `write_run`."""
    return _write_record(path_of_profile(output, record), record, force=force)


def write_sweep(output: Path, record: SweepRecord) -> Path:
    """Write a sweep, replacing the one of the same trials, and return its path.

    Raises:
        OutputError: the folder can't be written, or the disk is full.
    """
    path = path_of_sweep(output, record)
    write_atomically(path, _to_json(record))
    return path


def write_mechanisms(output: Path, mechanisms: Mechanisms) -> Path:
    """Write `mechanisms.json`, replacing the one that is there, and return its path."""
    path = output / MECHANISMS_FILE
    write_atomically(path, _to_json(mechanisms))
    return path


def _to_json(model: Strict) -> str:
    return model.model_dump_json(indent=1) + "\n"


def _write_record(path: Path, record: RunRecord | ProfileRecord, *, force: bool) -> Path:
    if not force and path.exists():
        raise ValueError(f"a record already exists at {path}; it is kept. Pass --force to replace it.")
    write_atomically(path, _to_json(record))
    return path


def read_run(path: Path) -> RunRecord:
    """Read a run.

    Raises:
        ValueError: the file is missing, corrupted or of another schema version; the text names it and says what to do.
    """
    return _read(path, RunRecord, "record")


def read_profile(path: Path) -> ProfileRecord:
    """Read a profile; raises as `read_run`."""
    return _read(path, ProfileRecord, "record")


def read_mechanisms(path: Path) -> Mechanisms:
    """Read a `mechanisms.json`; raises as `read_run`."""
    return _read(path, Mechanisms, "list of mechanisms")


def _read(path: Path, model: type[Model], what: str) -> Model:
    remedy = "Delete it and run the same command again."
    try:
        text = path.read_text(encoding="utf-8")
        document: Any = json.loads(text)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is corrupted or truncated: it is not a JSON {what} ({error}). {remedy}") from error
    _check_version(path, document, what, remedy)
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole document"
        raise ValueError(
            f"{path} is corrupted: it is not a valid {what} (field {field}: {first['msg']}). {remedy}"
        ) from error


def _check_version(path: Path, document: object, what: str, remedy: str) -> None:
    version = document.get("schema_version") if isinstance(document, dict) else None
    if type(version) is not int:
        raise ValueError(f"{path} is corrupted: a JSON {what} with a schema_version was expected. {remedy}")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{path} was written by a newer subquad (schema version {version}, this one reads {SCHEMA_VERSION}). "
            "Upgrade subquad, or use another --output."
        )
    if version < SCHEMA_VERSION:
        raise ValueError(
            f"{path} was written by an older subquad (schema version {version}, this one reads {SCHEMA_VERSION}). "
            "Run the same command again with --force."
        )


def read_all(output: Path) -> Records:
    """Read every record under `output`; files that can't be read are listed with their reasons and hide nothing.

    Raises:
        ValueError: `output` is not a folder.
    """
    if not output.is_dir():
        raise ValueError(f"there is no folder {output}; run `subquad compare` first, or name another with --output.")
    unreadable: list[Unreadable] = []
    runs = _read_each(sorted(output.glob("*/*@*/*/*/seed-*.json")), RunRecord, unreadable)
    profiles = _read_each(sorted(output.glob("*/profile/*.json")), ProfileRecord, unreadable)
    lists = _read_each([path for path in [output / MECHANISMS_FILE] if path.exists()], Mechanisms, unreadable)
    mechanisms = tuple(mechanism for entry in lists for mechanism in entry.mechanisms)
    sweeps = _read_each(sorted(output.glob("*/*@*/*/sweep-*.json")), SweepRecord, unreadable)
    return Records(tuple(runs), tuple(profiles), mechanisms, tuple(unreadable), tuple(sweeps))


def _read_each(paths: list[Path], model: type[Model], unreadable: list[Unreadable]) -> list[Model]:
    found: list[Model] = []
    for path in paths:
        try:
            found.append(_read(path, model, "record"))
        except ValueError as error:
            unreadable.append(Unreadable(path, str(error)))
    return found
