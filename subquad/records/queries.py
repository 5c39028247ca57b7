"""Questions asked of the records: which runs may stand in one table, what they scored, what they cost at their length.

Runs are comparable when hardware, task with data hash, preset, budget and the size of the model are the same; each such
group is one `Comparison`, and no figure is ever formed across two of them. Inside a comparison the seeds of one set-up
are one `Entry`. The guess without a model depends on the data alone and joins every comparison of its data.

This module forms means, errors and fronts; which mechanism to use is said by `benchmark.recommendation`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from subquad.records.measures import Speed, Summary, speed_at
from subquad.records.metrics import MetricKind
from subquad.records.schema import (
    DENSE,
    Budget,
    ProfileRecord,
    ReceiptRecord,
    RunRecord,
    Status,
    TaskInfo,
)
from subquad.records.scores import Metric, Score
from subquad.records.store import Records, canonical_hash, run_hash

PARAMETER_TOLERANCE = 0.10
QUICK_PRESET = "quick"


@dataclass(frozen=True, order=True)
class Protocol:
    """What must be equal for two runs to stand in one table; width and depth are None where the budget varies them."""

    hardware: str
    task: str
    data_hash: str
    preset: str
    budget_kind: str
    budget_amount: float
    width: str
    depth: str


def protocol_of(run: RunRecord) -> Protocol:
    """Return the protocol of a run. A parameter or FLOP budget sets width and depth free, the others fix them."""
    free = run.budget.kind in ("parameters", "flops")
    width, depth = ("", "") if free else (_field(run, "hidden_size"), _field(run, "num_hidden_layers"))
    task, budget = run.task, run.budget
    hardware = run.environment.hardware
    return Protocol(hardware, task.name, task.data_hash, run.preset, budget.kind, budget.amount, width, depth)


def _field(run: RunRecord, name: str) -> str:
    return str(run.model.get(name, ""))


@dataclass(frozen=True)
class Entry:
    """One row: the seeds of one set-up, with its profile on the same hardware and the proofs that failed."""

    key: str
    mixer_key: str
    label: str
    runs: tuple[RunRecord, ...]
    profile: ProfileRecord | None
    red_probes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The mixer's name."""
        return self.runs[0].mixer_name

    @property
    def finished(self) -> tuple[RunRecord, ...]:
        """The runs that ended well."""
        return tuple(run for run in self.runs if run.status is Status.OK)

    @property
    def clean(self) -> bool:
        """Whether every seed ended well and no proof failed; nothing else may be recommended."""
        return not self.red_probes and len(self.finished) == len(self.runs)

    @property
    def reason(self) -> str:
        """What is wrong with the row, "" where nothing is."""
        if self.red_probes:
            return "red probe: " + "; ".join(self.red_probes)
        failed = [run for run in self.runs if run.status is not Status.OK]
        counts = Counter(f"{run.status.value}: {run.message}" for run in failed)
        if len(failed) == len(self.runs):
            return "; ".join(counts)
        return "; ".join(f"{count} of {len(self.runs)} seeds {text}" for text, count in counts.items())

    @property
    def status(self) -> str:
        """One word or two for the row: "ok", "red probe", a failed status, or how many of the seeds are ok."""
        if self.red_probes:
            return "red probe"
        if len(self.finished) == len(self.runs):
            return Status.OK.value
        if self.finished:
            return f"{len(self.finished)} of {len(self.runs)} ok"
        return Counter(run.status.value for run in self.runs).most_common(1)[0][0]

    @property
    def best(self) -> Summary | None:
        """Test score at the best-validation step; None without a finished run or with a red probe."""
        return self._summary(lambda metric: metric.best_validation)

    @property
    def last(self) -> Summary | None:
        """Test score at the last step, otherwise as `best`."""
        return self._summary(lambda metric: metric.last_step)

    def _summary(self, score: Callable[[Metric], Score]) -> Summary | None:
        scores = [score(run.metric) for run in self.finished if run.metric is not None]
        if self.red_probes or not scores:
            return None
        return Summary(tuple(s.test for s in scores), tuple(s.test_standard_error for s in scores))

    @property
    def speed(self) -> Speed | None:
        """Time and memory at the task's length; None where not measured or with a red probe."""
        if self.profile is None or self.red_probes:
            return None
        return speed_at(self.profile, self.runs[0].task.max_length)

    @property
    def carries_state(self) -> bool | None:
        """Whether the model took its state from window to window; None where the data were no stream, or unknown."""
        return next((run.carries_state for run in self.finished), None)

    @property
    def unequal_parameters(self) -> bool:
        """Whether the model's size is more than 10 % from that of the same model with dense attention."""
        run = self.runs[0]
        if run.parameters_of_dense is None:
            return False
        return abs(run.parameters - run.parameters_of_dense) > PARAMETER_TOLERANCE * run.parameters_of_dense


@dataclass(frozen=True)
class Comparison:
    """All comparable runs of a task: entries in order (dense, by score, failed last) and the guess without a model."""

    protocol: Protocol
    task: TaskInfo
    budget: Budget
    entries: tuple[Entry, ...]
    guess: RunRecord | None

    @property
    def kind(self) -> MetricKind:
        """What is known of the metric: direction, unit, how it is written."""
        return self.task.kind

    @property
    def is_lra(self) -> bool:
        """Whether this is Long Range Arena: its data, and not the shortened protocol of the quick preset."""
        return self.task.is_lra and self.protocol.preset != QUICK_PRESET

    @property
    def dense(self) -> Entry | None:
        """The row of dense attention."""
        return next((entry for entry in self.entries if entry.name == DENSE), None)

    @property
    def guess_label(self) -> str:
        """What the guess is called, such as "majority class"; "" where it isn't recorded."""
        return self.guess.mixer_name.replace("_", " ") if self.guess else ""

    @property
    def guess_score(self) -> float | None:
        """Test score of the guess."""
        metric = self.guess.metric if self.guess else None
        return metric.best_validation.test if metric else None


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
    guesses: dict[tuple[str, str], RunRecord] = {}
    for run in records.runs:
        if run.is_guess:
            guesses.setdefault((run.task.name, run.task.data_hash), run)
        else:
            groups[protocol_of(run)].append(run)
    labels = mixer_labels(records)
    return tuple(
        Comparison(
            protocol=protocol,
            task=runs[0].task,
            budget=runs[0].budget,
            entries=_entries(runs, records, labels),
            guess=guesses.get((protocol.task, protocol.data_hash)),
        )
        for protocol, runs in sorted(groups.items(), key=lambda item: item[0])
    )


def _entries(runs: Sequence[RunRecord], records: Records, labels: dict[str, str]) -> tuple[Entry, ...]:
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
