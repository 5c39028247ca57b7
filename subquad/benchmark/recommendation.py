"""Which mechanism to use for a task, its length and a machine, with the evidence in one to three sentences.

The rule:

1. A mechanism with a red probe or with a seed that didn't end well is never recommended.
2. A mechanism has learned the task when its test score (best-validation step, mean over seeds) is better than the
   guess without a model by more than two standard errors. If none has, the answer is to train longer.
3. Mechanisms whose score is within two standard errors of the best are equally good. The error is that of the
   difference; each side's is the larger of the error over seeds and the one that the size of the test split causes.
4. Among the equally good, the one with the fastest forward + backward at the task's length is recommended; times
   within 2 % count as equal and then the one that saves fewer bytes for backward wins. One whose speed was not
   measured at that length can't win against one whose speed was.
5. Dense attention is a candidate like any other. Where it wins, the runner-up is named with the length from which it
   would pay.

Better is what the task's metric says: a higher accuracy, fewer bits. The answer is a pure function of the records: no
measuring, no files, no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from subquad.records import units
from subquad.records.comparison import Comparison, Entry
from subquad.records.conventions import DENSE
from subquad.records.measures import Speed, Summary
from subquad.records.metrics import MetricKind

STANDARD_ERRORS = 2.0
EQUAL_SPEED = 0.02
MAX_NAMED = 4


class Verdict(StrEnum):
    """What kind of answer a recommendation is."""

    USE = "use"
    KEEP_DENSE = "keep dense attention"
    TRAIN_LONGER = "train longer"
    NOTHING_FINISHED = "nothing finished"


@dataclass(frozen=True)
class Recommendation:
    """An answer: its kind, the entry that is meant (None without a winner), its equals, and the reason in sentences."""

    verdict: Verdict
    winner: Entry | None
    equals: tuple[Entry, ...]
    sentences: tuple[str, ...]


def recommend(comparison: Comparison) -> Recommendation:
    """Return which mechanism to use for the task of `comparison` at its length on its machine, and why."""
    scored = [(entry, entry.best) for entry in comparison.entries if entry.clean]
    candidates = [(entry, best) for entry, best in scored if best is not None]
    if not candidates:
        sentence = "No mechanism can be recommended: none finished all its runs with green probes."
        return Recommendation(Verdict.NOTHING_FINISHED, None, (), (sentence,))
    kind = comparison.kind
    top_entry, top = max(candidates, key=lambda pair: kind.goodness(pair[1].mean))
    guess = comparison.guess_score
    learned = [pair for pair in candidates if guess is None or _beats(pair[1], guess, kind)]
    if guess is not None and not learned:
        return Recommendation(Verdict.TRAIN_LONGER, None, (), (_nothing_learned(top_entry, top, comparison),))
    equals = [entry for entry, summary in learned if _equal(summary, top)]
    ranked = sorted(equals, key=lambda entry: _cost(entry, kind))
    winner = _fewest_bytes_among_ties(ranked)
    ranked = [winner, *(entry for entry in ranked if entry is not winner)]
    dense_wins = winner.name == DENSE
    sentences = (
        _score_sentence(winner, ranked[1:], comparison),
        _dense_sentence(winner, comparison, ranked) if dense_wins else _speed_sentence(winner, comparison),
        _caveats(winner, comparison),
    )
    verdict = Verdict.KEEP_DENSE if dense_wins else Verdict.USE
    return Recommendation(verdict, winner, tuple(ranked[1:]), tuple(sentence for sentence in sentences if sentence))


def _beats(summary: Summary, guess: float, kind: MetricKind) -> bool:
    return kind.goodness(summary.mean) - kind.goodness(guess) > STANDARD_ERRORS * summary.cautious_error


def _equal(summary: Summary, top: Summary) -> bool:
    return abs(top.mean - summary.mean) <= STANDARD_ERRORS * math.hypot(summary.cautious_error, top.cautious_error)


def _cost(entry: Entry, kind: MetricKind) -> tuple[float, float]:
    speed = entry.speed
    return (math.inf, -_goodness(entry, kind)) if speed is None else (speed.seconds, speed.saved_bytes)


def _goodness(entry: Entry, kind: MetricKind) -> float:
    return kind.goodness(entry.best.mean) if entry.best else -math.inf


def _fewest_bytes_among_ties(ranked: Sequence[Entry]) -> Entry:
    fastest = ranked[0].speed
    if fastest is None:
        return ranked[0]
    measured = [(entry, entry.speed) for entry in ranked]
    tied = [(e, s) for e, s in measured if s is not None and s.seconds <= fastest.seconds * (1 + EQUAL_SPEED)]
    return min(tied, key=lambda pair: pair[1].saved_bytes)[0]


def _nothing_learned(entry: Entry, summary: Summary, comparison: Comparison) -> str:
    kind, guess = comparison.kind, comparison.guess_score
    assert guess is not None
    better = kind.goodness(summary.mean) > kind.goodness(guess)
    against = "two standard errors don't separate from" if better else "is no better than"
    return (
        f"No mechanism has learned the task: train longer. The best, {entry.label}, reaches "
        f"{kind.on_test(summary.mean, summary.cautious_error)}, which {against} the "
        f"{comparison.guess_label} guess of {kind.write(guess)}."
    )


def _score(summary: Summary, kind: MetricKind) -> str:
    return kind.write(summary.mean, summary.cautious_error)


def _score_sentence(winner: Entry, others: Sequence[Entry], comparison: Comparison) -> str:
    kind, best = comparison.kind, winner.best
    verb = "Keep dense attention (full)" if winner.name == DENSE else f"Use {winner.label}"
    text = f"{verb}: {kind.on_test(best.mean, best.cautious_error)}" if best else verb
    rivals = [(entry, entry.best) for entry in comparison.entries if entry is not winner and entry.best is not None]
    if others:
        named = _listing([f"{e.label} ({_score(e.best, kind)})" for e in others if e.best is not None])
        return f"{text}, as good as {named} within two standard errors."
    if not rivals:
        return f"{text}; nothing else finished, so there is nothing to compare it with."
    second, score = max(rivals, key=lambda pair: kind.goodness(pair[1].mean))
    named = f"{second.label} ({_score(score, kind)})"
    if best is not None and not _equal(score, best) and kind.goodness(score.mean) < kind.goodness(best.mean):
        return f"{text}, {kind.difference(abs(best.mean - score.mean))} better than the next, {named}."
    return f"{text}; {named} can't be recommended: {second.reason or 'it did not learn'}."


def _listing(names: Sequence[str]) -> str:
    if len(names) > MAX_NAMED:
        names = [*names[: MAX_NAMED - 1], f"{len(names) - MAX_NAMED + 1} others"]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _speed_sentence(winner: Entry, comparison: Comparison) -> str:
    speed, tokens = winner.speed, units.count(comparison.task.max_length)
    if speed is None:
        title = comparison.kind.title
        return f"Its speed at {tokens} tokens was not measured, so {title} alone decides: run `subquad profile`."
    ratio = f"{units.times(speed.relative)} the speed of" if speed.relative >= 1 else "slower than"
    text = (
        f"At {tokens} tokens its forward + backward takes {units.seconds(speed.seconds)}, {ratio} dense fused "
        f"attention ({units.seconds(speed.dense_seconds)}); for backward it keeps {units.size(speed.saved_bytes)} "
        f"(dense {units.size(speed.dense_saved_bytes)})"
    )
    if speed.relative >= 1:
        return text + "."
    return f"{text}; it is recommended for its {comparison.kind.title} alone, and {_crossover(winner)}."


def _crossover(entry: Entry) -> str:
    profile = entry.profile
    if profile is None or not profile.points:
        return "the length from which it would pay was not measured"
    crossover = profile.crossover_length
    if crossover is None:
        return f"it is not faster than dense attention even at {_tokens(profile.points[-1].length)}"
    if crossover <= profile.points[0].length:
        return f"it is faster than dense attention from the shortest measured length, {_tokens(crossover)}, on"
    return f"it would pay from about {_tokens(float(f'{crossover:.2g}'))} on"


def _tokens(length: float) -> str:
    return f"{units.count(length)} tokens"


def _dense_sentence(dense: Entry, comparison: Comparison, ranked: Sequence[Entry]) -> str:
    others = [entry for entry in comparison.entries if entry.clean and entry is not dense and entry.best is not None]
    if not others:  # of which the first sentence speaks, where there was none at all
        return "No other mechanism finished with green probes." if len(comparison.entries) > 1 else ""
    kind = comparison.kind
    runner_up = ranked[1] if len(ranked) > 1 else max(others, key=lambda entry: _goodness(entry, kind))
    where = f"At {_tokens(comparison.task.max_length)}"
    if runner_up in ranked:
        text = f"{where} {_against_dense(runner_up.speed)}; {_crossover(runner_up)}."
        return text.replace("@", f"the runner-up, {runner_up.label},", 1)
    difference = kind.difference(_goodness(dense, kind) - _goodness(runner_up, kind))
    return f"The runner-up, {runner_up.label}, is worse by {difference}; by time, {_crossover(runner_up)}."


def _against_dense(speed: Speed | None) -> str:
    if speed is None:
        return "the speed of @ was not measured"
    return f"@ takes {units.seconds(speed.seconds)} for forward + backward against {units.seconds(speed.dense_seconds)}"


def _caveats(winner: Entry, comparison: Comparison) -> str:
    caveats = []
    if all(len(entry.runs) == 1 for entry in comparison.entries):
        caveats.append("only one seed was run, so the errors speak of the size of the test split alone")
    elif len(winner.runs) == 1:
        caveats.append(f"only one seed of {winner.label} was run")
    if comparison.guess_score is None:
        caveats.append("the guess without a model is not recorded, so it is open whether the task was learned")
    if winner.unequal_parameters:
        caveats.append(f"the parameters of {winner.label} are more than 10 % from those of the dense model")
    if not caveats:
        return ""
    text = "; ".join(caveats)
    return f"Note: {text}."
