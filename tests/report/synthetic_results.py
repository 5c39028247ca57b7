"""A made-up but realistic results folder: six mechanisms and the majority guess, two seeds, profiles over five lengths.

One seed of Linformer diverged, Reformer has a red probe, AFT has no profile. Every number comes from a formula, so that
tests can foretell what the page must show.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from subquad.records.mechanisms import Mechanism, Mechanisms, Picture
from subquad.records.schema import (
    Budget,
    CostRecord,
    Environment,
    ProbeRecord,
    ProfilePoint,
    ProfileRecord,
    ReceiptRecord,
    RunRecord,
    Status,
    TaskInfo,
    Timing,
)
from subquad.records.scores import CurvePoint, Metric, PositionBucket, Score
from subquad.records.store import write_mechanisms, write_profile, write_run
from subquad.records.sweeps import SweepRecord, TrialRecord, TunedRecord

LENGTHS = (256, 512, 1024, 2048, 4096)
SEEDS = (0, 1)
STEPS = 2000
WIDTH = 64

ENVIRONMENT = Environment(
    hardware="amd-epyc-2-threads",
    cpu="AMD EPYC 7B13",
    accelerator=None,
    threads=2,
    memory_bytes=8_000_000_000,
    operating_system="Linux 6.8",
    python="3.11.7",
    torch="2.13.0",
    transformers="5.23.0",
    subquad="0.1.0",
    commit="51ae97b",
)
TASK = TaskInfo(
    name="listops-quick",
    title="ListOps, short trees",
    is_lra=False,
    objective="classification",
    metric="accuracy",
    data_hash="3fa9c1d2",
    train_size=20_000,
    validation_size=2_000,
    test_size=2_000,
    vocab_size=17,
    num_labels=10,
    max_length=1_000,
)


@dataclass(frozen=True)
class Spec:
    """What is made up of one mechanism; `per_token` and `per_pair` are microseconds of a forward + backward."""

    name: str
    family: str
    accuracy: float
    parameters: int
    per_token: float
    per_pair: float
    bytes_per_token: int
    options: tuple[tuple[str, JsonValue], ...] = ()

    @property
    def mixer(self) -> dict[str, JsonValue]:
        return {"name": self.name, **dict(self.options)}

    def milliseconds(self, length: int) -> float:
        return (self.per_token * length + self.per_pair * length**2) / 1000


SPECS = (
    Spec("full", "dense", 0.412, 131_402, 9.0, 0.0130, 3_100),
    Spec("local", "sparse", 0.401, 131_402, 11.5, 0.0, 3_400, (("window", 129),)),
    Spec("linear", "factorised", 0.372, 131_402, 6.4, 0.0, 2_700),
    Spec("performer", "factorised", 0.366, 131_402, 16.8, 0.0, 5_900, (("features", 64),)),
    Spec("linformer", "factorised", 0.355, 162_250, 7.2, 0.0, 2_900, (("rank", 64),)),
    Spec("reformer", "sparse", 0.360, 127_306, 48.0, 0.0, 9_400, (("rounds", 4),)),
    Spec("aft", "attention-free", 0.338, 131_402, 5.0, 0.002, 2_500),
)
TRAITS = ("bidirectional", "causal", "cross", "padding", "segments", "state", "constant_state", "global_tokens")


def model() -> dict[str, JsonValue]:
    return {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def accuracy(spec: Spec, seed: int) -> float:
    return round(spec.accuracy + (0.006 if seed else -0.006) * (1 + len(spec.name) % 3) / 2, 4)


def curve(spec: Spec, seed: int, *, diverges: bool) -> list[CurvePoint]:
    points = []
    for step in range(100, STEPS + 1, 100):
        progress = 1 - math.exp(-step / (420 + 30 * len(spec.name)))
        wobble = 0.006 * math.sin(step / 90 + seed + len(spec.name))
        if diverges and step > 900:
            points.append(CurvePoint(step=step, train_loss=math.nan))
            break
        loss = 2.28 - 1.6 * spec.accuracy * progress + 2 * wobble + (0.0012 * step if diverges else 0)
        points.append(
            CurvePoint(step=step, train_loss=loss, validation=0.12 + (spec.accuracy - 0.12) * progress + wobble)
        )
    return points


def scored(step: int, validation: float, test: float) -> Score:
    error = math.sqrt(test * (1 - test) / TASK.test_size)
    return Score(step=step, validation=validation, test=test, test_standard_error=error)


def run(spec: Spec, seed: int, environment: Environment = ENVIRONMENT) -> RunRecord:
    diverged = spec.name == "linformer" and seed == 1
    value = accuracy(spec, seed)
    metric = Metric(
        name="accuracy",
        higher_is_better=True,
        examples=TASK.test_size,
        asked=TASK.test_size,
        best_validation=scored(1800, value + 0.004, value),
        last_step=scored(STEPS, value - 0.002, value - 0.003),
    )
    red = spec.name == "reformer"
    leak = ProbeRecord(name="leak", passed=not red, detail="y[12] saw x[40]" if red else "", seconds=0.4)
    return RunRecord(
        created="2026-11-21T10:12:00+00:00",
        command=f"subquad compare --task listops --preset quick --mixers {spec.name} --seeds {seed} --output results",
        mixer=spec.mixer,
        receipts=(),
        environment=environment,
        status=Status.DIVERGED if diverged else Status.OK,
        message="the training loss was not finite at step 1,000" if diverged else "",
        task=TASK,
        placement="sublayer",
        model=model(),
        parameters=spec.parameters,
        parameters_of_dense=131_402,
        preset="quick",
        steps=STEPS,
        budget=Budget(kind="steps", amount=STEPS),
        seed=seed,
        metric=None if diverged else metric,
        curve=tuple(curve(spec, seed, diverges=diverged)),
        train_seconds=40.0 + 3 * spec.per_token,
        saved_bytes=40_000_000 + 4_000 * spec.bytes_per_token,
        peak_bytes=90_000_000 + 6_000 * spec.bytes_per_token,
        probes=(leak, ProbeRecord(name="padding", passed=True, detail="", seconds=0.2)),
    )


def majority() -> RunRecord:
    score = scored(0, 0.171, 0.1735)
    metric = Metric(
        name="accuracy", higher_is_better=True, examples=2_000, asked=2_000, best_validation=score, last_step=score
    )
    return RunRecord(
        created="2026-11-21T10:10:00+00:00",
        command="subquad compare --task listops --preset quick --mixers majority_class --output results",
        mixer={"name": "majority_class"},
        environment=ENVIRONMENT,
        status=Status.OK,
        task=TASK,
        placement="none",
        model={},
        parameters=0,
        parameters_of_dense=None,
        preset="quick",
        steps=0,
        budget=Budget(kind="steps", amount=STEPS),
        seed=0,
        metric=metric,
        train_seconds=0.0,
    )


BITS_TASK = TASK.model_copy(
    update={
        "name": "text",
        "title": "Text, byte by byte",
        "objective": "causal_lm",
        "metric": "bits_per_byte",
        "data_hash": "77aa",
        "vocab_size": 257,
        "num_labels": None,
    }
)
BUCKETS = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 127), (128, 255), (256, 511), (512, 999))


def bits(spec: Spec, seed: int) -> float:
    """Fewer than the more accurate mechanisms need."""
    return round(3.2 - 2.5 * accuracy(spec, seed), 4)


def bits_metric(best: float, by_position: tuple[PositionBucket, ...] = ()) -> Metric:
    scores = [
        Score(step=step, validation=value, test=value, test_standard_error=0.011)
        for step, value in ((1800, best), (STEPS, best + 0.004))
    ]
    sizes = {"examples": BITS_TASK.test_size, "asked": 999 * BITS_TASK.test_size, "by_position": by_position}
    return Metric(name="bits_per_byte", higher_is_better=False, best_validation=scores[0], last_step=scores[1], **sizes)


def bits_run(spec: Spec, seed: int) -> RunRecord:
    """A run of the same mechanism on text, as a stream."""
    value, record = bits(spec, seed), run(spec, seed)
    buckets = tuple(
        PositionBucket(first=first, last=last, asked=BITS_TASK.test_size * (last - first + 1), value=value + 2 / last)
        for first, last in BUCKETS
    )
    curve = tuple(
        point.model_copy(update={"validation": point.validation and 5 - 6 * point.validation}) for point in record.curve
    )
    changes: dict[str, object] = {"task": BITS_TASK, "curve": curve, "carries_state": spec.name == "linear"}
    if record.metric is not None:
        changes["metric"] = bits_metric(value, buckets)
    return record.model_copy(update=changes)


def unigram() -> RunRecord:
    changes = {"task": BITS_TASK, "mixer": {"name": "unigram"}, "metric": bits_metric(4.71)}
    return majority().model_copy(update=changes)


def write_bits_results(output: Path) -> Path:
    """Write a folder of runs on text, measured in bits per byte, and return it."""
    for spec in SPECS:
        for seed in SEEDS:
            write_run(output, bits_run(spec, seed))
        if spec.name != "aft":
            write_profile(output, profile(spec))
    write_run(output, unigram())
    write_mechanisms(output, Mechanisms(mechanisms=tuple(mechanism(spec) for spec in SPECS)))
    return output


def timing(milliseconds: float, spread: float = 0.05) -> Timing:
    return Timing(samples_seconds=tuple(milliseconds / 1e3 * (1 + spread * (i - 10) / 10) for i in range(21)))


def profile(spec: Spec, environment: Environment = ENVIRONMENT) -> ProfileRecord:
    dense = SPECS[0]

    def point(length: int) -> ProfilePoint:
        mine, other = spec.milliseconds(length), dense.milliseconds(length)
        return ProfilePoint(
            length=length,
            forward=timing(mine / 3),
            forward_backward=timing(mine, 0.5 if spec.name == "local" else 0.12),
            dense_forward=timing(other / 3),
            dense_forward_backward=timing(other),
            saved_bytes=spec.bytes_per_token * length,
            dense_saved_bytes=dense.bytes_per_token * length,
            peak_bytes=2 * spec.bytes_per_token * length,
            dense_peak_bytes=2 * dense.bytes_per_token * length,
            cost=cost(spec, length),
            dense_cost=cost(dense, length),
        )

    padding = ReceiptRecord(
        where="local attention",
        asked="length 1,000",
        ran="length 1,024",
        reason="the window needs whole blocks of 64",
        count=12,
    )
    return ProfileRecord(
        created="2026-11-21T12:40:00+00:00",
        command=f"subquad profile --mixers {spec.name} --lengths 256,512,1024,2048,4096 --output results",
        mixer=spec.mixer,
        receipts=(padding,) if spec.name == "local" else (),
        environment=environment,
        status=Status.OK,
        embed_dim=WIDTH,
        num_heads=4,
        batch_size=1,
        dtype="float32",
        causal=False,
        points=tuple(point(length) for length in LENGTHS),
    )


def cost(spec: Spec, length: int) -> CostRecord:
    flops = round(spec.per_token * 3_400 * length + spec.per_pair * 20_000 * length**2)
    memory = round(0.9 * spec.bytes_per_token * length)
    return CostRecord(flops=flops, activation_bytes=memory, state_bytes=0, parameters=16_640)


def picture(name: str, *, causal: bool) -> Picture | None:
    if name in ("linear", "performer", "aft", "linformer"):
        return None
    reach = {"full": 32, "local": 4, "reformer": 0}[name]

    def sees(i: int, j: int) -> bool:
        seen = abs(i - j) <= reach if reach else (7 * i) % 8 == (7 * j) % 8 or abs(i - j) < 2
        return seen and (j <= i or not causal)

    return Picture(length=32, rows=tuple("".join("01"[sees(i, j)] for j in range(32)) for i in range(32)))


def mechanism(spec: Spec) -> Mechanism:
    red = spec.name == "reformer"
    return Mechanism(
        name=spec.name,
        family=spec.family,
        summary=f"The {spec.name} mechanism: each query sees the keys drawn here and weighs them by a softmax.",
        paper="A. Author, B. Author: On the mechanism, 2020, arXiv:2004.05150",
        formula="yᵢ = Σⱼ∈N(i) softmax(qᵢ·kⱼ / √d) vⱼ",
        traits={trait: (len(spec.name) + index) % 3 != 0 for index, trait in enumerate(TRAITS)},
        probes=(
            ProbeRecord(name="padding", passed=True, detail=""),
            ProbeRecord(name="leak", passed=not red, detail="y[12] saw x[40]" if red else ""),
        ),
        picture=picture(spec.name, causal=False),
        causal_picture=picture(spec.name, causal=True),
    )


def tuned(spec: Spec, scores: tuple[float | None, ...], chosen: int | None, **options: JsonValue) -> TunedRecord:
    """Trials over as many learning rates, None for one that diverged."""
    trials = tuple(
        TrialRecord(
            varied={"learning_rate": 1e-3 * 3**index, **options},
            mixer=spec.mixer,
            validation=score,
            status="ok" if score is not None else "diverged",
            reason="" if score is not None else "diverged: the loss is not finite",
        )
        for index, score in enumerate(scores)
    )
    test = None if chosen is None else accuracy(spec, 0)
    edge = ("learning_rate",) if chosen == 0 else ()
    error = None if chosen is None else 0.011
    return TunedRecord(
        mechanism=spec.name, trials=trials, chosen=chosen, test=test, test_standard_error=error, at_edge=edge
    )


def swept() -> SweepRecord:
    """A sweep of three mechanisms: one has its best at the edge, of one every trial diverged."""
    return SweepRecord(
        created="2026-11-22T08:00:00+00:00",
        command="subquad sweep --task listops --preset quick --mixers full,local,linear --grid learning_rate=1e-3,3e-3",
        hardware=ENVIRONMENT.hardware,
        task=TASK,
        preset_name="quick",
        preset="quick",
        seeds=SEEDS,
        mechanisms=(
            tuned(SPECS[0], (0.40, 0.43, 0.41), 1),
            tuned(SPECS[1], (0.39, None, 0.37), 0, window=9),
            tuned(SPECS[2], (None, None, None), None),
        ),
        recommendation=("Use local: as good as full.", "It is faster."),
        winner="local learning_rate=0.001",
    )


def write_results(output: Path) -> Path:
    """Write the whole folder and return it."""
    for spec in SPECS:
        for seed in SEEDS:
            write_run(output, run(spec, seed))
        if spec.name != "aft":
            write_profile(output, profile(spec))
    write_run(output, majority())
    write_mechanisms(output, Mechanisms(mechanisms=tuple(mechanism(spec) for spec in SPECS)))
    return output
