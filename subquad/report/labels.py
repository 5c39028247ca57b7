"""Where the names of bubbles go so that they cover neither each other nor a bubble.

A greedy search over eight positions around each bubble; good for the few dozen points a comparison has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

CHARACTER_WIDTH = 7.8
LINE_HEIGHT = 15.0
GAP = 5.0
MARKER_PADDING = 2.0
LINE_PARTS = 24

Rectangle = tuple[float, float, float, float]


@dataclass(frozen=True)
class Bubble:
    """A bubble in pixels, y upwards, with the lines of its label and half the length of its error bar."""

    x: float
    y: float
    radius: float
    error: float
    lines: tuple[str, ...]

    @property
    def label_size(self) -> tuple[float, float]:
        """Width and height of the label in pixels, estimated from the number of characters."""
        return CHARACTER_WIDTH * max(len(line) for line in self.lines), LINE_HEIGHT * len(self.lines)


def place(
    bubbles: Sequence[Bubble], line: Sequence[tuple[float, float]], width: float, height: float
) -> list[tuple[float, float]]:
    """Return for each bubble the offset in pixels from its centre to the centre of its label; `line` is kept free."""
    taken = [_square(bubble) for bubble in bubbles]
    taken += [(b.x - GAP, b.y - b.error, b.x + GAP, b.y + b.error) for b in bubbles]
    taken += [_stroke(start, end, part) for start, end in pairwise(line) for part in range(LINE_PARTS)]
    offsets = []
    for bubble in bubbles:
        candidates = _candidates(bubble)
        boxes = [_box(bubble, offset) for offset in candidates]
        costs = [_outside(box, width, height) + sum(_overlap(box, other) for other in taken) for box in boxes]
        best = min(range(len(costs)), key=lambda index: (costs[index], index))
        taken.append(boxes[best])
        offsets.append(candidates[best])
    return offsets


def _candidates(bubble: Bubble) -> list[tuple[float, float]]:
    width, height = bubble.label_size
    side, above = bubble.radius + GAP + width / 2, bubble.radius + GAP + height / 2
    over_bar = max(bubble.radius, bubble.error) + GAP + height / 2
    corner_x, corner_y = 0.7 * bubble.radius + GAP + width / 2, 0.7 * bubble.radius + GAP + height / 2
    corners = [(x, y) for x in (corner_x, -corner_x) for y in (corner_y, -corner_y)]
    return [(side, 0.0), (-side, 0.0), *corners, (0.0, over_bar), (0.0, -over_bar), (0.0, above), (0.0, -above)]


def _square(bubble: Bubble) -> Rectangle:
    reach = bubble.radius + MARKER_PADDING
    return bubble.x - reach, bubble.y - reach, bubble.x + reach, bubble.y + reach


def _stroke(start: tuple[float, float], end: tuple[float, float], part: int) -> Rectangle:
    xs = [start[0] + (end[0] - start[0]) * (part + step) / LINE_PARTS for step in (0, 1)]
    ys = [start[1] + (end[1] - start[1]) * (part + step) / LINE_PARTS for step in (0, 1)]
    return min(xs), min(ys) - GAP, max(xs), max(ys) + GAP


def _box(bubble: Bubble, offset: tuple[float, float]) -> Rectangle:
    width, height = bubble.label_size
    x, y = bubble.x + offset[0], bubble.y + offset[1]
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(one: Rectangle, other: Rectangle) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _outside(box: Rectangle, width: float, height: float) -> float:
    area = (box[2] - box[0]) * (box[3] - box[1])
    return 4 * (area - _overlap(box, (0.0, 0.0, width, height)))
