"""The Compressive Transformer as its paper tells it: one stream, one segment, one token after the other, with lists."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from comparison import finish, is_valid, split_heads
from torch import Tensor

from subquad import Mask
from subquad.mechanisms.compressive import Compressive
from subquad.ops.memory.sinusoids import distance_sinusoids


class Told(NamedTuple):
    """What the definition says: y (B, L, D), squared differences of the auxiliary loss, and the memories at the end."""

    y: Tensor
    squares: list[Tensor]
    memories: list[list[Tensor]]
    rows: list[list[Tensor]]


class Stream:
    """The memories of one stream, and what happens at the end of a segment."""

    def __init__(self, mixer: Compressive) -> None:
        config = mixer.config
        self.mixer, self.config = mixer, config
        self.memory_length = config.eviction(training=mixer.training).memory_length
        self.most = config.rows(training=mixer.training)
        zero = torch.zeros(mixer.dims.embed_dim, dtype=torch.float64)
        self.memory = [zero] * self.memory_length if config.zero_memory else []
        self.rows = [zero] * self.most if config.zero_memory else []
        self.waiting: list[Tensor] = []
        self.usage: list[Tensor] = []  # of what waits
        self.squares: list[Tensor] = []

    def heads(self, layer: torch.nn.Module, tokens: list[Tensor]) -> Tensor:
        """Projected tokens (N, H, E)."""
        return split_heads(self.mixer, layer, torch.stack(tokens)[None])[0]

    def encoded(self, distances: list[int], projection: Tensor) -> Tensor:
        table = distance_sinusoids(
            max(distances) + 1, self.mixer.dims.embed_dim, device=projection.device, dtype=torch.float64
        )
        return (table[distances] @ projection.T).unflatten(-1, (self.mixer.dims.num_heads, -1))

    def read(self, segment: list[Tensor], i: int) -> tuple[Tensor, Tensor]:
        """What token i of the segment reads (H, E), and the attention (H, ·) that memory and segment get."""
        mixer, rows = self.mixer, self.rows[len(self.rows) - min(len(self.rows), self.most) :]
        tokens = [x.detach() for x in self.memory] + segment[: i + 1]
        q = self.heads(mixer.project_query, [segment[i]])[0]
        far = list(range(len(tokens) - 1, -1, -1))
        k, v = (self.heads(layer, rows + tokens) for layer in (mixer.project_key, mixer.project_value))
        position = torch.einsum("he,jhe->hj", q + mixer.position_bias, self.encoded(far, mixer.project_distance))
        if rows:
            official = self.config.cm_positions == "official"
            start = i if official else i + len(self.memory) + len(self.waiting)
            far = [start + (1 if official else self.config.rate) * (len(rows) - j) for j in range(len(rows))]
            w = mixer.row_position_bias if mixer.row_position_bias is not None else mixer.position_bias
            r = mixer.project_row_distance if mixer.project_row_distance is not None else mixer.project_distance
            position = torch.cat((torch.einsum("he,jhe->hj", q + w, self.encoded(far, r)), position), dim=1)
        scores = (torch.einsum("he,jhe->hj", q + mixer.content_bias, k) + position) / q.shape[-1] ** 0.5
        weights = scores.softmax(dim=1)
        return torch.einsum("hj,jhe->he", weights, v), weights[:, len(rows) :]

    def run(self, segment: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """What the tokens of a segment read, and the usage of memory and segment."""
        usage, outputs = torch.zeros(len(self.memory) + len(segment), dtype=torch.float64), []
        for i in range(len(segment)):
            out, weights = self.read(segment, i)
            usage[: weights.shape[1]] += weights.detach().mean(dim=0) / len(segment)
            outputs.append(out)
        return outputs, usage

    def end(self, segment: list[Tensor], usage: Tensor) -> None:
        """Move the memory on and compress what leaves it."""
        config = self.config
        both = [x.detach() for x in self.memory + segment]
        leaving = max(0, len(both) - self.memory_length)
        old, self.memory = self.waiting + both[:leaving], both[leaving:]
        used = self.usage + list(usage[:leaving])
        window = config.rate + config.overlap + sum(config.used_dilations)
        count = 0
        while count * config.rate + window <= len(old):
            count += 1
        if not count:
            self.waiting, self.usage = old, used
            return
        carry = config.remainder == "carry"
        taken = old[: (count - 1) * config.rate + window] if carry else old
        if config.compression == "most_used":
            ranked = sorted(range(len(taken)), key=lambda j: (-float(used[j]), j))
            made = torch.stack([taken[j] for j in sorted(ranked[:count])])
        else:
            starts = range(0, count * config.rate, config.rate)
            made = torch.stack([self.compressed(torch.stack(taken[s : s + window])) for s in starts])
        self.judge(segment, taken, made)
        self.rows += list(made if config.trained_by == "bptt" else made.detach())
        left = count * config.rate if carry else len(old)
        self.waiting, self.usage = old[left:], used[left:]

    def compressed(self, window: Tensor) -> Tensor:
        """f_c of a window (W, D)."""
        if self.config.compression in ("max", "mean"):
            return window.amax(dim=0) if self.config.compression == "max" else window.mean(dim=0)
        layers = self.mixer.compress
        dilated = layers.get_submodule("dilated").parameters()
        tokens = window.T[None]  # (1, D, W), as torch's convolutions want it
        width = window.shape[1]
        for dilation, weight in zip(self.config.used_dilations, dilated, strict=True):
            kernel = weight.unflatten(1, (2, width)).transpose(1, 2)
            tokens = F.conv1d(tokens, kernel, dilation=dilation).relu()
        kernel = layers.get_parameter("weight").unflatten(1, (-1, width)).transpose(1, 2)
        return F.conv1d(tokens, kernel)[0, :, 0]

    def judge(self, segment: list[Tensor], old: list[Tensor], rows: Tensor) -> None:
        """The squared differences that train f_c."""
        mixer = self.mixer
        if self.config.trained_by == "autoencoding":
            assert mixer.decode is not None
            decoded = (rows @ mixer.decode.weight.T).unflatten(-1, (self.config.rate, -1)).flatten(0, 1)
            self.squares.append((torch.stack(old[: len(decoded)]) - decoded).square().flatten())
        if self.config.trained_by == "attention":
            with torch.no_grad():
                q = self.heads(mixer.project_query, segment)
            reads = []
            for tokens in (torch.stack(old), rows):
                k, v = (
                    F.linear(tokens, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
                    for layer in (mixer.project_key, mixer.project_value)
                )
                k, v = (split_heads(mixer, torch.nn.Identity(), heads) for heads in (k, v))
                weights = (torch.einsum("ihe,jhe->hij", q, k) / q.shape[-1] ** 0.5).softmax(dim=-1)
                reads.append(torch.einsum("hij,jhe->ihe", weights, v))
            self.squares.append((reads[0].detach() - reads[1]).square().flatten())


def by_segments(mixer: Compressive, x: Tensor, mask: Mask | None, calls: list[int], *, state: bool) -> Told:
    """The definition.

    Args:
        mixer: its parameters and options.
        x: (B, L, D), all calls together.
        mask: padding.
        calls: tokens of each call, which are the segments unless these have a length of their own.
        state: whether a state is carried, so that the last call moves the memory on too.
    """
    outputs, squares, memories, all_rows = [], [], [], []
    for b in range(x.shape[0]):
        stream, read, segment = Stream(mixer), {}, []
        places = [[i for i in range(s, s + n) if is_valid(mask, b, i)] for s, n in _starts(calls)]
        tokens = [i for call in places for i in call]
        size = mixer.config.segment_length
        segments = [call for call in places if call]
        if size is not None:
            segments = [tokens[s : s + size] for s in range(0, len(tokens), size)]
        for index, members in enumerate(segments):
            segment = [x[b, i] for i in members]
            found, usage = stream.run(segment)
            read.update(zip(members, found, strict=True))
            complete = size is None or len(members) == size
            if complete and (state or index + 1 < len(segments)):
                stream.end(segment, usage)
                segment = []
        nothing = x.new_zeros(mixer.dims.num_heads, mixer.dims.head_dim)
        outputs.append(torch.stack([read.get(i, nothing) for i in range(x.shape[1])]))
        squares += stream.squares
        memories.append(stream.memory + [token.detach() for token in segment])
        all_rows.append(stream.rows)
    return Told(finish(mixer, torch.stack(outputs), mask), squares, memories, all_rows)


def _starts(calls: list[int]) -> list[tuple[int, int]]:
    return [(sum(calls[:index]), size) for index, size in enumerate(calls)]
