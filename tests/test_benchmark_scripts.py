"""What the scripts under benchmarks/ compute besides times: pairs, ratios, promises; and that the peers are fair."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subquad.build import build_mixer, cost
from subquad.layers.heads import HeadMixer
from subquad.ops.pattern.attention import pattern_attention

SCRIPTS = (
    "sampling",
    "attention_rows",
    "pattern_cases",
    "scaling",
    "pattern_small",
    "pattern_attention",
    "mechanism_cases",
    "mechanism_attention",
    "attention_free_cases",
    "attention_free",
    "hugging_face",
    "generation",
    "stream_evaluation",
)
ROWS = ("window-513", "window-129", "causal-256", "bigbird", "fixed", "strided", "dilated", "ngram")


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})


def small_mixer(name: str, **options: Any) -> HeadMixer:
    mixer = build_mixer(name, embed_dim=16, num_heads=2, **options)
    assert isinstance(mixer, HeadMixer)
    return mixer


def test_methods_take_turns_and_the_warm_up_is_not_counted(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(scripts.sampling, "_seconds", lambda function: (function(), float(len(calls)))[1])
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    taken = scripts.sampling.sample_by_turns(functions, samples=2, warm_up=1, title="")
    assert "".join(calls) == "ababab"
    assert taken == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


@pytest.mark.parametrize(("seconds", "samples"), [(0.5, 15), (2.5, 5)])
def test_slow_methods_are_sampled_less_often(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, seconds: float, samples: int
) -> None:
    monkeypatch.setattr(scripts.sampling, "_seconds", lambda function: function())
    functions = {"fast": lambda: 0.1, "slow": lambda: seconds}
    taken = scripts.sampling.sample_by_turns(functions, samples=None, warm_up=1, title="")
    assert taken == {"fast": [0.1] * samples, "slow": [seconds] * samples}


def test_a_spread_is_the_median_between_the_quartiles(scripts: SimpleNamespace) -> None:
    spread = scripts.sampling.Spread.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (spread.lower, spread.median, spread.upper) == (2.0, 3.0, 4.0)
    assert spread.milliseconds() == "3,000 (2,000–4,000)"


def test_a_slow_phase_that_hits_both_methods_leaves_the_speed_up_certain(scripts: SimpleNamespace) -> None:
    own = [1.0, 1.0, 1.5, 1.5, 3.0]
    speed_up = scripts.sampling.SpeedUp.of([2 * seconds for seconds in own], own)
    assert (speed_up.ratio, speed_up.lowest, speed_up.highest) == (2.0, 2.0, 2.0)


def test_the_interval_of_a_noisy_speed_up_holds_its_ratio(scripts: SimpleNamespace) -> None:
    speed_up = scripts.sampling.SpeedUp.of([2.0, 2.2, 1.8, 2.1, 1.9], [1.0, 0.9, 1.1, 1.0, 1.2])
    assert 1.0 < speed_up.lowest < speed_up.ratio == 2.0 < speed_up.highest


@pytest.mark.parametrize("row", ROWS)
@given(length=st.integers(1, 400))
def test_pairs_are_counted_as_the_pattern_shows_them(scripts: SimpleNamespace, row: str, length: int) -> None:
    pattern = scripts.pattern_cases.CASES[row].pattern(length)
    shown = pattern.dense(length).expand(scripts.attention_rows.HEADS, length, length)
    assert scripts.pattern_cases.visible_pairs(pattern, length) == int(shown.sum())


@pytest.mark.parametrize("row", ROWS)
def test_keys_are_the_most_that_a_query_outside_global_rows_sees(scripts: SimpleNamespace, row: str) -> None:
    case, length = scripts.pattern_cases.CASES[row], 1152
    seen = case.pattern(length).dense(length).sum(dim=-1)
    inner = seen[..., 64:-64] if row == "bigbird" else seen
    assert int(inner.max()) == case.keys(length)


@pytest.mark.parametrize("row", ROWS)
def test_a_promise_begins_at_the_shortest_length_that_keeps_its_distance(scripts: SimpleNamespace, row: str) -> None:
    case = scripts.pattern_cases.CASES[row]
    border = case.shortest_that_pays()
    assert border >= case.pays_from * case.keys(border)
    assert border - 1 < case.pays_from * case.keys(border - 1)


def test_every_row_of_the_table_is_known(scripts: SimpleNamespace) -> None:
    assert tuple(scripts.pattern_cases.CASES) == ROWS


def test_nothing_is_timed_where_the_engine_is_wrong(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    case = scripts.pattern_cases.CASES["ngram"]
    monkeypatch.setattr(scripts.pattern_cases, "GATE_LENGTH", 40)
    scripts.pattern_cases.check_against_definition(case)
    factors = {None: 1.001, "dense": 1.0}
    monkeypatch.setattr(
        scripts.pattern_cases,
        "pattern_attention",
        lambda q, k, v, pattern, backend=None: factors[backend] * pattern_attention(q, k, v, pattern, backend=backend),
    )
    with pytest.raises(SystemExit, match="ngram: the result is off by 1"):
        scripts.pattern_cases.check_against_definition(case)


def test_the_table_holds_what_the_file_holds(
    scripts: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(scripts.pattern_cases, "GATE_LENGTH", 40)
    monkeypatch.setattr(scripts.pattern_attention, "prepare_torch", lambda threads: None)
    monkeypatch.setattr(scripts.attention_rows, "sgemm_flops_per_second", lambda: 1e11)
    path = tmp_path / "figures.json"
    scripts.pattern_attention.main(
        ["--lengths", "64", "--rows", "ngram", "window-129", "--samples", "2", "--warm-up", "1", "--json", str(path)]
    )
    figures, printed = json.loads(path.read_text(encoding="utf-8")), capsys.readouterr().out
    assert [(row["name"], row["length"], row["against"]) for row in figures["rows"]] == [
        ("ngram", 64, "causal dense"),
        ("window-129", 64, "dense"),
    ]
    for row in figures["rows"]:
        assert row["speed_up"]["ratio"] == pytest.approx(row["dense_seconds"]["median"] / row["seconds"]["median"])
        assert f"{1e3 * row['seconds']['median']:,.4g}" in printed
    pairs = 8 * (64 * 7 - 21)
    ngram = figures["rows"][0]
    assert ngram["flops_per_second"] * ngram["seconds"]["median"] == pytest.approx(3.5 * 4 * 64 * pairs)
    assert ngram["of_sgemm"] == pytest.approx(ngram["flops_per_second"] / 1e11)


@pytest.mark.parametrize("method", ["linear-causal", "routing", "combiner-rowmajor", "gated-delta"])
def test_a_mechanism_runs_beside_its_baseline_and_its_operations_grow_with_the_length(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    monkeypatch.setattr(scripts.mechanism_attention, "prepare_torch", lambda threads: None)
    monkeypatch.setattr(scripts.attention_rows, "sgemm_flops_per_second", lambda: 1e11)
    scripts.mechanism_attention.main(["--lengths", "256", "--rows", method, "--samples", "1", "--warm-up", "0"])
    assert method in capsys.readouterr().out
    case = scripts.mechanism_cases.CASES[method]
    assert 1.9 < case.useful_flops(512) / case.useful_flops(256) < 4
    assert case.baseline(256) == ("dense" if method == "routing" else "causal dense")


@pytest.mark.parametrize(
    ("name", "mixer", "options"),
    [
        ("aft-full", "aft", {"kind": "full"}),
        ("aft-full-causal", "aft", {"kind": "full", "causal": True}),
        ("gmlp", "gmlp", {}),
        ("lstm", "r_transformer", {"cell": "lstm", "causal": True}),
    ],
)
def test_products_that_a_mechanism_is_held_against_are_those_of_its_price(
    scripts: SimpleNamespace, name: str, mixer: str, options: dict[str, Any]
) -> None:
    length, sizes = 600, {"embed_dim": 512, "num_heads": 8, "max_length": 600}
    found = sum(one.flops for one in scripts.attention_free_cases.CASES[name].products(length))
    simpler = {"aft": {**options, "kind": "simple"}, "r_transformer": {**options, "local_layers": 0}}
    price = cost(mixer, length=length, **sizes, **options).flops
    without = cost(mixer, length=length, **sizes, **simpler[mixer]).flops if mixer in simpler else 0
    assert found == price - without


def test_methods_without_attention_are_held_against_dense_attention_or_their_products(
    scripts: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(scripts.attention_free, "prepare_torch", lambda threads: None)
    names, path = ["aft-simple", "aft-local", "gmlp", "rnn"], tmp_path / "figures.json"
    scripts.attention_free.main(
        ["--length", "160", "--rows", *names, "--samples", "2", "--warm-up", "0", "--json", str(path)]
    )
    figures, printed = json.loads(path.read_text(encoding="utf-8")), capsys.readouterr().out
    assert [row["name"] for row in figures["rows"]] == names
    assert [row["against"] for row in figures["rows"]] == [*["causal dense"] * 2, "products of gmlp", "products of rnn"]
    for row in figures["rows"]:
        own, its, faster = row["seconds"]["median"], row["its_seconds"]["median"], row["against"] == "causal dense"
        assert row["ratio"]["ratio"] == pytest.approx(its / own if faster else own / its)
        assert row["reached"] == ((its / own >= row["target"]) if faster else (own / its <= row["target"]))
        assert f"{'≥' if faster else '≤'} {row['target']:g}×" in printed


def test_time_per_token_and_growth_of_memory_are_taken_between_lengths(scripts: SimpleNamespace) -> None:
    spread = scripts.sampling.Spread
    point = scripts.scaling.Point
    points = [point(100, spread(1.0, 1, 1), 30), point(200, spread(2.2, 2, 3), 60), point(800, spread(8.0, 8, 8), None)]
    scaling = scripts.scaling.Scaling("window", points)
    assert scaling.spread == pytest.approx(0.1)
    assert [scaling.growth(index) for index in range(3)] == [None, 2.0, None]


@pytest.mark.parametrize(
    ("interval", "verdict"), [((0.5, 0.9), "slower"), ((0.9, 1.1), "level"), ((1.1, 2.0), "faster")]
)
def test_a_pattern_is_slower_only_where_the_whole_interval_is(
    scripts: SimpleNamespace, interval: tuple[float, float], verdict: str
) -> None:
    spread, speed_up = scripts.sampling.Spread(1.0, 1.0, 1.0), scripts.sampling.SpeedUp(1.0, *interval)
    assert scripts.pattern_small.Point("window", 64, True, spread, spread, speed_up).verdict.plain == verdict


def test_big_bird_without_its_matrix_of_probabilities_computes_the_same(scripts: SimpleNamespace) -> None:
    mixer, zeros = small_mixer("full"), torch.zeros
    theirs = importlib.import_module("transformers.models.big_bird.modeling_big_bird").BigBirdBlockSparseAttention
    layers = [
        scripts.hugging_face.HuggingFaceBigBird(mixer, block=4, random=3, length=64, attention=attention)
        for attention in (theirs, scripts.hugging_face.BigBirdWithoutProbabilities)
    ]
    x = torch.randn(1, 64, 16, requires_grad=True)
    results = [layer(x) for layer in layers]
    gradients = [torch.autograd.grad(result.square().sum(), x)[0] for result in results]
    assert torch.equal(*results)
    assert torch.equal(*gradients)
    assert torch.zeros is zeros
    blocked, band, queries, keys = layers[1].masks
    _, probabilities = layers[1].attention(x, band, queries, keys, blocked, blocked)
    assert isinstance(probabilities, scripts.hugging_face.Discarded)


def test_hugging_face_longformer_with_our_weights_is_our_longformer(scripts: SimpleNamespace) -> None:
    mixer = small_mixer("longformer", window=5)
    x = torch.randn(2, 16, 16)
    theirs = scripts.hugging_face.HuggingFaceLongformer(mixer, attention_window=4)(x)
    torch.testing.assert_close(mixer(x).y, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("written", [["--json", "FILE"], ["--json=FILE"]])
def test_figures_name_the_command_that_makes_them_again(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[str]
) -> None:
    path = tmp_path / "figures.json"
    asked = [argument.replace("FILE", str(path)) for argument in written]
    monkeypatch.setattr("sys.argv", ["/anywhere/benchmarks/peers.py", "--samples", "5", *asked, "--length", "64"])
    scripts.sampling.write_figures(path, {"rows": []})
    document = json.loads(path.read_text())
    assert document["command"] == "python benchmarks/peers.py --samples 5 --length 64"
    assert document["rows"] == []


def test_a_stream_is_flat_when_neither_time_nor_memory_grows(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, stream = scripts.generation.Mark, scripts.generation.Stream
    assert stream("linear", mark(1.0, 100), mark(1.09, 200), 8).flat
    assert not stream("linear", mark(1.0, 100), mark(1.11, 100), 8).flat
    assert not stream("linear", mark(1.0, 0), mark(1.0, 17_000_000), 8).flat
    monkeypatch.setattr(scripts.generation, "FIRST", 20)
    monkeypatch.setattr(scripts.generation, "AROUND", 5)
    found = scripts.generation.write_stream("aft:kind=simple", 60, 16, torch.get_num_threads())
    assert found.early.seconds > 0
    assert found.state_bytes > 0


def test_the_curve_of_attention_lengths_is_measured_and_drawn(scripts: SimpleNamespace, tmp_path: Path) -> None:
    options = SimpleNamespace(width=16, layers=1, samples=2, tokens=256)
    point = scripts.stream_evaluation.measure(64, options)
    assert min(point.early_seconds, point.late_seconds, point.window_seconds) > 0
    figures = scripts.stream_evaluation.Point(512, early_seconds=1.0, late_seconds=1.1, window_seconds=132.0)
    assert (figures.ratio, figures.apart) == pytest.approx((120.0, 0.1))
    scripts.stream_evaluation.draw([point, figures], tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").read_text().count("<path") > 10
