"""What attention to a segment and to the memory before it sees of a stream, and how much of it there is to compute."""

from __future__ import annotations

from typing import NamedTuple


class SegmentRule(NamedTuple):
    """What a token sees, in training or in evaluation.

    Attributes:
        memory_length: M.
        same_length: whether every token sees M keys.
        clamp_length: the largest distance with an encoding of its own, or None.
    """

    memory_length: int
    same_length: bool
    clamp_length: int | None


def segment_pairs(length: int, segment_length: int | None, rule: SegmentRule, *, zero_memory: bool) -> tuple[int, int]:
    """Visible pairs of a stream's first tokens, and the number of distances among them.

    Args:
        length: tokens.
        segment_length: N; None for one segment.
        rule: what each sees.
        zero_memory: whether zeros before the first token are seen.
    """
    pairs, farthest = 0, 0
    step = segment_length or max(1, length)
    for start in range(0, length, step):
        size = min(step, length - start)
        before = rule.memory_length if zero_memory else min(rule.memory_length, start)
        if rule.same_length:
            reach = rule.memory_length
            growing = min(size, max(0, reach - before))  # tokens that see less than the full number of keys
            pairs += growing * before + growing * (growing + 1) // 2 + (size - growing) * reach
            farthest = max(farthest, min(reach, before + size))
        else:
            pairs += size * before + size * (size + 1) // 2
            farthest = max(farthest, before + size)
    return pairs, farthest
