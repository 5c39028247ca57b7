"""What pattern attention keeps and takes."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from long_patterns import LONG, triple

from subquad import Mask
from subquad.benchmark.memory import allocated_peak_bytes, saved_bytes
from subquad.ops import pattern_attention
from subquad.ops.pattern import blocked, tile_piece
from subquad.ops.pattern.blocked import plan_pattern
from subquad.ops.pattern.strip_piece import StripPiece
from subquad.ops.pattern.strips import Shape
from subquad.patterns import Causal, Pattern, Random, Sink, Strided, Window, blocks

EVERYTHING = Strided(1)


@pytest.mark.parametrize("name", LONG)
def test_only_q_k_v_the_result_and_its_log_sum_exp_are_kept(name: str) -> None:
    q, k, v = triple(1100, dtype=torch.float32, width=16)
    assert saved_bytes(lambda: pattern_attention(q, k, v, LONG[name]), ()) == 4 * q.nbytes + q.nbytes // 16


@pytest.mark.parametrize("length", [20, 100, 400, 900])
@pytest.mark.parametrize("pattern", [Window(9, 9), Causal() & (Sink(2) | Strided(3)), ~Strided(2)])
def test_little_more_is_kept_where_dense_attention_runs_in_slices(pattern: Pattern, length: int) -> None:
    q, k, v = triple(length, dtype=torch.float32, width=16)
    assert saved_bytes(lambda: pattern_attention(q, k, v, pattern), ()) <= 1.15 * (4 * q.nbytes + q.nbytes // 16)


@pytest.mark.parametrize("name", [*LONG, "dense slices"])
def test_a_step_takes_memory_in_proportion_to_the_length(name: str) -> None:
    pattern = ~Strided(2) if name == "dense slices" else LONG[name]

    def peak(length: int) -> int:
        q, k, v = triple(length, dtype=torch.float32, width=16)
        pattern_attention(q, k, v, pattern).sum().backward()  # what is remembered from call to call
        return allocated_peak_bytes(lambda: pattern_attention(q, k, v, pattern).sum().backward())

    length = 2048 if name == "dense slices" else 4096
    assert peak(2 * length) < 2.3 * peak(length)


@pytest.mark.parametrize("documents", [1, 2, 40])
@pytest.mark.parametrize("pattern", [EVERYTHING, Causal()], ids=["everything", "causal"])
def test_padding_and_documents_take_memory_in_proportion_to_the_length(pattern: Pattern, documents: int) -> None:
    def peak(length: int) -> int:
        q, k, v = triple(length, dtype=torch.float32, width=16)
        place = torch.arange(length)[None]
        mask = Mask(place < length - 100, place * documents // length)
        return allocated_peak_bytes(lambda: pattern_attention(q, k, v, pattern, mask=mask).sum().backward())

    assert peak(8192) < 2.3 * peak(4096)


@pytest.mark.parametrize("pattern", [Causal(), Window(900, 900)], ids=["causal", "window"])
def test_the_masks_that_a_plan_remembers_grow_as_the_length(pattern: Pattern) -> None:
    def remembered(length: int) -> int:
        q, k, v = triple(length, dtype=torch.float32, width=16)
        pattern_attention(q, k, v, pattern, mask=Mask(torch.arange(length)[None] < length - 100))
        shape = Shape(2, length, length, 0, blocked.CALL_FLOPS // 32)
        (part,) = plan_pattern(pattern, shape, sliced=True).parts
        assert isinstance(part.piece, StripPiece)
        storages = [bias.values.untyped_storage() for bias in part.piece._shared_biases.values()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    assert 0 < remembered(8192) < 2.3 * remembered(4096)


def kept_and_peak_bytes(pattern: Pattern, length: int) -> tuple[int, int]:
    """Of compiling a pattern for two heads."""
    plan_pattern.cache_clear()
    tracemalloc.start()
    plan = plan_pattern(pattern, Shape(2, length, length, 0, 8192), sliced=False)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.parts
    return kept, peak


@pytest.mark.parametrize("name", [*LONG, "random by head"])
def test_what_a_plan_takes_grows_as_the_length(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In chunks so small that their workspace, which has a bound, is lost beside it."""
    monkeypatch.setattr(tile_piece, "CLASSES", 2**12)
    monkeypatch.setattr(blocks, "CHUNK_PAIRS", 2**12)
    near = Window(64, 64) | Sink(128)
    by_head = (near | Random(64, 3, 0, near)).heads({1: near | Random(64, 3, 1, near)})
    pattern = by_head if name == "random by head" else LONG[name]
    (kept, peak), (twice_kept, twice_peak) = (kept_and_peak_bytes(pattern, length) for length in (8192, 16384))
    assert twice_kept < 2.5 * kept + 2**16
    assert twice_peak < 2.5 * peak + 2**16
