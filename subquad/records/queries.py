"""Questions asked of the records: which runs may stand in one table, what each mixer is called, what it cost.

The guess without a model depends on the data alone and joins every comparison of its data. This module forms rows and
tables; which mechanism to use is said by `benchmark.recommendation`.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

from pydantic import JsonValue

from subquad.records.comparison import Comparison, Entry, Protocol, preset_of, protocol_of
from subquad.records.conventions import DENSE
from subquad.records.schema import ProfileRecord, ReceiptRecord, RunRecord, Status, TaskInfo
from subquad.records.store import Records, canonical_hash, run_hash


def mixer_key(mixer: dict[str, JsonValue]) -> str:
    """Return what identifies a mixer's configuration; equal for equal options in any order."""
    return canonical_hash(mixer)


def mixer_labels(records: Records) -> dict[str, str]:
    """Return a label for each mixer key: the name, with the options that differ where a name has several set-ups."""
    mixers = {mixer_key(record.mixer): record.mixer for record in (*records.runs, *records.profiles)}
    by_name: dict[JsonValue, list[str]] = defaultdict(list)
    for key, mixer in mixers.items():
        by_name[mixer["name"]].append(key)
    labels = {}
    for name, keys in by_name.items():
        options = {option for key in keys for option in mixers[key]}
        differing = [o for o in sorted(options) if len({canonical_hash(mixers[k].get(o)) for k in keys}) > 1]
        for key in keys:
            shown = [f"{o}={mixers[key][o]}" for o in differing if o in mixers[key]]
            labels[key] = " ".join([str(name), *shown])
    return labels


def comparisons(records: Records) -> tuple[Comparison, ...]:
    """Return every comparison, ordered by hardware, task and preset."""
    groups: dict[Protocol, list[RunRecord]] = defaultdict(list)
    for run in records.runs:
        if not run.is_guess:
            groups[protocol_of(run)].append(run)
    return tuple(
        Comparison(
            protocol=protocol,
            preset=preset_of(runs[0]),
            task=runs[0].task,
            budget=runs[0].budget,
            entries=entries_of(runs, records),
            guess=guess_of(runs[0].task, records),
        )
        for protocol, runs in sorted(groups.items(), key=lambda item: item[0])
    )


def guess_of(task: TaskInfo, records: Records) -> RunRecord | None:
    """Return the guess without a model on the data of a task, None where it isn't recorded."""
    same = (run for run in records.runs if (run.task.name, run.task.data_hash) == (task.name, task.data_hash))
    return next((run for run in same if run.is_guess), None)


def entries_of(runs: Sequence[RunRecord], records: Records) -> tuple[Entry, ...]:
    """Return the rows that some of the records' runs make: dense attention first, then by score, failed ones last."""
    labels = mixer_labels(records)
    by_set_up: dict[str, list[RunRecord]] = defaultdict(list)
    for run in runs:
        by_set_up[run_hash(mixer=run.mixer, model=run.model, preset=run.preset, budget=run.budget)].append(run)
    red = red_probes(records)
    entries = []
    for key, seeds in by_set_up.items():
        first = seeds[0]
        entries.append(
            Entry(
                key=key,
                mixer_key=mixer_key(first.mixer),
                label=labels[mixer_key(first.mixer)],
                runs=tuple(sorted(seeds, key=lambda run: run.seed)),
                profile=_profile_for(first, records.profiles),
                red_probes=red.get(mixer_key(first.mixer), ()),
            )
        )
    kind = runs[0].task.kind

    def rank(entry: Entry) -> tuple[bool, bool, float, str]:
        goodness = kind.goodness(entry.best.mean) if entry.best else 0.0
        return entry.name != DENSE, entry.best is None, -goodness, entry.label

    return tuple(sorted(entries, key=rank))


def red_probes(records: Records) -> dict[str, tuple[str, ...]]:
    """Return the proofs that failed by mixer key, from the runs and from `mechanisms.json`; only mixers with any."""
    by_name = {mechanism.name: mechanism.red_probes for mechanism in records.mechanisms}
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for record in (*records.runs, *records.profiles):
        for probe in by_name.get(record.mixer_name, ()):
            found[mixer_key(record.mixer)][f"{probe.name} ({probe.detail})"] = None
    for run in records.runs:
        for probe in run.probes:
            if not probe.passed:
                found[mixer_key(run.mixer)][f"{probe.name} ({probe.detail})"] = None
    return {key: tuple(texts) for key, texts in found.items()}


def _profile_for(run: RunRecord, profiles: Sequence[ProfileRecord]) -> ProfileRecord | None:
    """Return the profile of the run's mixer on its hardware, of the width and direction of its model."""
    width, causal = run.model.get("hidden_size"), run.model.get("causal")
    for profile in profiles:
        if (
            profile.status is Status.OK
            and profile.environment.hardware == run.environment.hardware
            and mixer_key(profile.mixer) == mixer_key(run.mixer)
            and width in (None, profile.embed_dim)
            and causal in (None, profile.causal)
        ):
            return profile
    return None


def receipts_of(runs: Sequence[RunRecord | ProfileRecord]) -> tuple[ReceiptRecord, ...]:
    """Return the receipts of several records, equal ones added up."""
    counts: Counter[tuple[str, str, str, str]] = Counter()
    for receipt in (receipt for run in runs for receipt in run.receipts):
        counts[receipt.where, receipt.asked, receipt.ran, receipt.reason] += receipt.count
    return tuple(
        ReceiptRecord(where=where, asked=asked, ran=ran, reason=reason, count=count)
        for (where, asked, ran, reason), count in counts.items()
    )
