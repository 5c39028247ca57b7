"""Profiles of several mixers: measured in the worker, peak memory in fresh processes, one record for each mixer."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from subquad.benchmark.environment import this_environment
from subquad.benchmark.mixers import NamedMixer, parse_mixer
from subquad.benchmark.observer import Observer
from subquad.benchmark.plan import first_line
from subquad.benchmark.profiler import (
    Measured,
    measure_length,
    peak_bytes_in_fresh_process,
    profile_dims,
    profile_point,
    receipt_record,
)
from subquad.benchmark.worker import Progress, Worker, WorkerDiedError, WorkError
from subquad.receipt import Receipts
from subquad.records.conventions import DENSE
from subquad.records.schema import ProfilePoint, ProfileRecord, ReceiptRecord, Status, utc_now
from subquad.records.store import path_of_profile, read_profile, write_profile
from subquad.training.presets import ProfileSettings

Pair = tuple[Measured, Measured]
"""A mixer and dense attention, measured by turns."""


@dataclass(frozen=True)
class Profile:
    """What was measured of one mixer.

    Attributes:
        points: in order of length.
        receipts: of the mixer at all these lengths, equal ones added up.
        failure: why the points end early, or "".
    """

    points: tuple[ProfilePoint, ...] = ()
    receipts: tuple[ReceiptRecord, ...] = ()
    failure: str = ""


NOT_MEASURED = Profile(failure="not measured yet")


def profile_mixers(
    mixers: Sequence[NamedMixer],
    settings: ProfileSettings,
    output: Path,
    worker: Worker,
    observer: Observer,
    *,
    causal: bool = False,
    force: bool = False,
) -> list[Path]:
    """Profile the mixers that have no profile at these lengths yet, and write a record for each.

    A profile that was recorded at other lengths is measured again at those and these. One that ended early is kept.

    Args:
        mixers: what to profile.
        settings: lengths and sizes.
        output: folder of the records.
        worker: where the measuring happens.
        observer: hears what happens.
        causal: profile the causal forms.
        force: replace profiles that are there.

    Raises:
        OutputError: the output can't be written.
    """
    known = {mixer.text: _recorded(mixer, settings, output, causal=causal) for mixer in mixers}
    missing = [mixer for mixer in mixers if force or not _is_complete(known[mixer.text], settings)]
    if not missing:
        return []
    if not force:
        recorded = {point.length for m in missing if (record := known[m.text]) for point in record.points}
        settings = replace(settings, lengths=tuple(sorted(recorded | set(settings.lengths))))
    profiles = _measure(missing, settings, worker, observer, causal=causal)
    paths = []
    for mixer in missing:
        profile = profiles[mixer.text]
        if profile.failure:
            observer.say(f"{mixer.text}: {profile.failure}")
        record = _record(mixer, settings, profile, causal=causal)
        paths.append(write_profile(output, record, force=True))
    return paths


def _recorded(mixer: NamedMixer, settings: ProfileSettings, output: Path, *, causal: bool) -> ProfileRecord | None:
    path = path_of_profile(output, _record(mixer, settings, causal=causal))
    return read_profile(path) if path.exists() else None


def _is_complete(record: ProfileRecord | None, settings: ProfileSettings) -> bool:
    if record is None or record.status is not Status.OK:
        return False
    return bool(record.message) or {point.length for point in record.points} >= set(settings.lengths)


def find_profiles(
    mixers: Sequence[NamedMixer], settings: ProfileSettings, output: Path, *, causal: bool = False
) -> list[ProfileRecord]:
    """The recorded profiles of the mixers, in their order.

    Raises:
        ValueError: a record can't be read.
    """
    return [read_profile(path_of_profile(output, _record(mixer, settings, causal=causal))) for mixer in mixers]


def measure_in_worker(
    texts: Sequence[str], settings: ProfileSettings, length: int, causal: bool, progress: Progress
) -> list[Pair]:
    """Measure mixers at one length; called in the worker process."""
    progress(0, 1, "")
    mixers, dense = measure_length([parse_mixer(text).config for text in texts], settings, length, causal=causal)
    return list(zip(mixers, dense, strict=True))


def _measure(
    mixers: Sequence[NamedMixer],
    settings: ProfileSettings,
    worker: Worker,
    observer: Observer,
    *,
    causal: bool,
) -> dict[str, Profile]:
    """Profiles by mixer."""
    texts = [mixer.text for mixer in mixers]
    measured: dict[tuple[str, int], Pair] = {}
    failures = dict.fromkeys(texts, "")
    step = observer.begin("profile speed")
    for index, length in enumerate(settings.lengths):
        step.progress(index, len(settings.lengths), f"{length:,} tokens")
        alive = [text for text in texts if not failures[text]]
        if not alive:
            break
        failures |= _measure_length(alive, settings, length, worker, causal, measured)
    step.end(f"{len(texts)} mixers at {len(settings.lengths)} lengths", failed=any(failures.values()))
    peaks = _peaks([*dict.fromkeys([DENSE, *texts])], settings, observer, causal=causal)
    return {
        text: _profile(
            {length: pair for (mixer, length), pair in measured.items() if mixer == text},
            peaks[text],
            peaks[DENSE],
            failures[text],
        )
        for text in texts
    }


def _profile(
    pairs: Mapping[int, Pair], peaks: Mapping[int, int], dense_peaks: Mapping[int, int], failure: str
) -> Profile:
    """The profile of what was measured at each length, and of the peaks of memory that are known."""
    left = Receipts()
    for mixer, _ in pairs.values():
        for receipt in mixer.receipts:
            left.add(receipt)
    return Profile(
        tuple(profile_point(length, *pairs[length], peaks.get(length), dense_peaks.get(length)) for length in pairs),
        tuple(receipt_record(receipt) for receipt in left.entries),
        failure,
    )


def _measure_length(
    texts: list[str],
    settings: ProfileSettings,
    length: int,
    worker: Worker,
    causal: bool,
    measured: dict[tuple[str, int], Pair],
) -> dict[str, str]:
    """Measure all together; if that fails, one by one, so that one mechanism's failure is its own.

    Returns:
        Failures by mixer.
    """

    def fail(group: list[str]) -> dict[str, str]:
        try:
            pairs = worker.call(measure_in_worker, group, settings, length, causal)
        except WorkerDiedError as error:
            return dict.fromkeys(group, f"at {length} tokens: {error}")
        except WorkError as error:
            return dict.fromkeys(group, f"at {length} tokens: {first_line(error.kind, str(error))}")
        measured.update({(text, length): pair for text, pair in zip(group, pairs, strict=True)})
        return {}

    failures = fail(texts)
    if not failures or len(texts) == 1:
        return failures
    return {text: failure for each in texts for text, failure in fail([each]).items()}


def _peaks(
    texts: list[str], settings: ProfileSettings, observer: Observer, *, causal: bool
) -> dict[str, dict[int, int]]:
    step = observer.begin("profile memory")
    peaks: dict[str, dict[int, int]] = {}
    for index, text in enumerate(texts):
        step.progress(index, len(texts), text)
        peaks[text] = peak_bytes_in_fresh_process(text, settings, causal=causal)
    step.end(f"{len(texts)} fresh processes")
    return peaks


def _record(
    mixer: NamedMixer,
    settings: ProfileSettings,
    profile: Profile = NOT_MEASURED,
    *,
    causal: bool,
) -> ProfileRecord:
    dims = profile_dims(mixer.config, settings, causal=causal)
    form = " --causal" if dims.causal and mixer.config.traits.bidirectional else ""
    lengths = ",".join(str(length) for length in settings.lengths)
    text = shlex.quote(mixer.text)
    return ProfileRecord(
        created=utc_now(),
        command=(
            f"subquad profile --mixers {text} --lengths {lengths} --embed-dim {settings.embed_dim} "
            f"--num-heads {settings.num_heads} --batch-size {settings.batch_size} --rounds {settings.rounds}{form}"
        ),
        mixer=mixer.config.to_dict(),
        environment=this_environment(),
        receipts=profile.receipts,
        status=Status.OK if profile.points else Status.FAILED,
        message=profile.failure,
        embed_dim=settings.embed_dim,
        num_heads=settings.num_heads,
        batch_size=settings.batch_size,
        dtype="float32",
        causal=dims.causal,
        points=profile.points,
    )
