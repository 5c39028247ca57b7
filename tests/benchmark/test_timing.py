import pytest

from subquad.benchmark import timing
from subquad.benchmark.timing import interleaved_seconds, matmul_flops_per_second


def test_functions_take_turns_and_warm_up_first() -> None:
    calls: list[str] = []
    samples = interleaved_seconds({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warm_up=2)
    assert "".join(calls) == "abc" * 5
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_sample_is_the_time_of_its_function_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

        def advance(self, seconds: float) -> None:
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    functions = {"fast": lambda: clock.advance(1), "slow": lambda: clock.advance(4)}
    assert interleaved_seconds(functions, rounds=2) == {"fast": [1, 1], "slow": [4, 4]}


def test_the_rate_of_a_product_counts_its_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "interleaved_seconds", lambda functions, **_: {"product": [9.0, 2.0, 1.0]})
    assert matmul_flops_per_second(4) == 2 * 4**3 / 2.0
