"""A cache holds the valid tokens of a stream; attending to it equals attending over the whole stream at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subquad import Mask
from subquad.interface import Dims
from subquad.layers.cache import KeyValueCache, attend_cached, empty_cache, store_keys
from subquad.layers.heads import Heads
from subquad.ops.pattern.attention import pattern_attention
from subquad.patterns import Causal, Strided, Window

DIMS = Dims(embed_dim=6, num_heads=2, head_dim=3, causal=True)
PATTERN = Causal() & (Window(2, 0) | Strided(3))


def nothing(batch: int) -> KeyValueCache:
    return empty_cache(DIMS, batch, torch.device("cpu"), torch.float64)


def drawn_heads(batch: int, length: int, mask: Mask) -> Heads:
    q, k, v = (torch.randn(batch, 2, length, 3, dtype=torch.float64) for _ in range(3))
    return Heads(torch.empty(0), q, k, v, mask, mask)


def piece(heads: Heads, start: int, stop: int) -> Heads:
    facts = (None if fact is None else fact[:, start:stop] for fact in (heads.mask.valid, heads.mask.segments))
    mask = Mask(*facts)
    assert heads.k is not None
    assert heads.v is not None
    q, k, v = (tensor[:, :, start:stop] for tensor in (heads.q, heads.k, heads.v))
    return Heads(heads.x, q, k, v, mask, mask)


@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=4), padded=st.booleans(), data=st.data())
def test_a_stream_by_any_causal_pattern_equals_each_row_alone(
    pieces: list[int], padded: bool, data: st.DataObject
) -> None:
    length = sum(pieces)
    valid = torch.rand(2, length) < 0.6 if padded else torch.ones(2, length, dtype=torch.bool)
    segments = (torch.rand(2, length) < 0.3).cumsum(dim=1) if data.draw(st.booleans()) else None
    heads = drawn_heads(2, length, Mask(valid if padded else None, segments))
    assert heads.k is not None
    assert heads.v is not None
    cache, outputs, start = nothing(2), [], 0
    for size in pieces:
        out, cache = attend_cached("mine", piece(heads, start, start + size), PATTERN, cache)
        outputs.append(out)
        start += size
    streamed = torch.cat(outputs, dim=2)
    for row in range(2):
        kept = valid[row]
        q, k, v = (tensor[row : row + 1, :, kept] for tensor in (heads.q, heads.k, heads.v))
        mask = None if segments is None else Mask(segments=segments[row : row + 1, kept])
        alone = pattern_attention(q, k, v, PATTERN, mask=mask)
        torch.testing.assert_close(streamed[row : row + 1, :, kept], alone, rtol=1e-10, atol=1e-10)


def test_valid_tokens_are_stored_in_their_order_without_gaps() -> None:
    valid = torch.tensor([[True, False, True], [False, False, True]])
    heads = drawn_heads(2, 3, Mask(valid, torch.tensor([[4, 4, 5], [4, 5, 6]])))
    assert heads.k is not None
    assert heads.v is not None
    cache, columns, segments = store_keys("mine", nothing(2), heads.k, heads.v, heads.mask)
    assert cache.length.tolist() == [2, 1]
    assert columns[valid].tolist() == [0, 1, 0]
    assert segments.tolist() == [[4, 4, 5], [4, 5, 6]]
    assert cache.segments.tolist() == [[4, 5], [6, 0]]
    assert torch.equal(cache.keys[0], heads.k[0, :, [0, 2]])
    assert torch.equal(cache.values[1, :, :1], heads.v[1, :, 2:])
    assert not cache.keys[1, :, 1:].any()


def test_segments_that_decrease_along_the_stream_are_refused_in_the_owners_name() -> None:
    heads = drawn_heads(1, 2, Mask(segments=torch.tensor([[3, 4]])))
    assert heads.k is not None
    assert heads.v is not None
    cache, _, _ = store_keys("mine", nothing(1), heads.k, heads.v, heads.mask)
    with pytest.raises(ValueError, match=r"^mine: segment numbers must not decrease along a stream; go on from \[4\]"):
        store_keys("mine", cache, heads.k, heads.v, heads.mask)
