"""BigBird: a window, random blocks and global tokens, so that any two tokens are a few steps apart.

Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences", arXiv:2007.14062, section 2 and appendix D; the form
with a global stream is that of Ainslie et al. 2020, "ETC: Encoding Long and Structured Inputs", arXiv:2004.08483.

    kind="itc", blocks of b tokens, the first and the last of them global; query block t sees
    t = 0 or last:  every block                else:  {0, last} ∪ {t - s..t + s} ∪ R random blocks of its own

    kind="etc", the first g tokens a global stream, the others long; two softmaxes over s_ij
    i long:   all global j ∪ {|i - j| <= (W - 1) / 2}        i global:  every j
    s_ij = (q_i · k_j + q_i · a_id(i,j) + β_id(i,j)) / √E,  id = the distance, clipped at m

Cost O(L (s b + R b + W + g) D). In a model the global stream is learned vectors, prepended. Random blocks differ by
layer and head; they are a function of (seed, layer, head, L), the same in training and evaluation.

Departures: random blocks are drawn uniformly from those not visible already, all of them where fewer are left (the
official code draws from the first 1024 tokens or from the first 2 R + 5 blocks, Hugging Face's reads block 0 instead in
evaluation). A last, short block is a block; the official code needs a multiple of b. Padding sees and is seen by
nothing. Pairs of a long and a global token have one id, for ETC's structural ids need structure; ETC's global tokens
stand for sentences, here they are learned vectors; feed-forward and norms of a layer serve both streams.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from torch import Tensor

from subquad.costs import Cost, visible_pairs
from subquad.interface import Dims, MixerConfig, TokenMixer, Traits
from subquad.layers.global_local import GlobalLocalMixer, GlobalLocalOptions, Sharing, global_local_cost
from subquad.layers.heads import HeadMixer, Heads, attention_cost, projection_cost
from subquad.mask import Mask
from subquad.ops.pattern.attention import pattern_attention
from subquad.patterns.blocks import BlockWindow, Random
from subquad.patterns.pattern import Pattern
from subquad.patterns.tokens import Global
from subquad.registry import register
from subquad.state import State

_OF_KIND = {
    "itc": ("block", "window_blocks", "num_random", "seed"),
    "etc": ("num_global", "window", "max_distance", "sharing", "share_output"),
}
_ETC_DEFAULTS = {"window": 169, "max_distance": 12, "sharing": "none", "share_output": False}
_LOWEST = {"block": 1, "window_blocks": 1, "num_random": 0, "seed": 0, "num_global": 1, "window": 1, "max_distance": 0}


@register("bigbird")
@dataclass(frozen=True, kw_only=True)
class BigBirdConfig(MixerConfig):
    """Options of BigBird. Those of the other kind must be left out."""

    family: ClassVar[str] = "sparse"

    kind: Literal["itc", "etc"] = "itc"
    """Global tokens are tokens of the input ("itc") or a stream of their own ("etc")."""
    block: int = 64
    """itc: b, tokens of a block."""
    window_blocks: int = 3
    """itc: 2 s + 1, blocks around a token's own, itself included; odd."""
    num_random: int = 3
    """itc: R, random blocks that a block sees."""
    seed: int = 0
    """itc: seeds the random blocks, together with layer and head."""
    num_global: int | None = None
    """etc: g, tokens of the global stream; must be given. 256 in the paper."""
    window: int | None = None
    """etc: W, long tokens that a long token sees, itself included; odd. None for 169."""
    max_distance: int | None = None
    """etc: m, where relative distances are clipped; 0 for no relative positions. None for 12."""
    sharing: Sharing | None = None
    """etc: keys and values by a projection for each of four pieces, for each softmax ("kv"), or one for all, as then
    for queries too ("qkv"). None for "none"."""
    share_output: bool | None = None
    """etc: one output projection for both streams. None for False."""

    def __post_init__(self) -> None:
        """Check ranges, and fill in the defaults of the chosen kind."""
        super().__post_init__()
        self._refuse_other_kind()
        if self.kind == "etc":
            for name, default in _ETC_DEFAULTS.items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, default)
        self.check_least(_LOWEST)
        for name in ("window", "window_blocks"):
            value = getattr(self, name)
            if value is not None and value % 2 == 0:
                raise ValueError(
                    f"bigbird: {name} counts both sides and its middle, so it must be odd; got {value}, use "
                    f"{value - 1} or {value + 1}"
                )

    def _refuse_other_kind(self) -> None:
        other = "etc" if self.kind == "itc" else "itc"
        defaults = {field.name: field.default for field in fields(self)}
        for name in _OF_KIND[other]:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"bigbird: {name}={getattr(self, name)!r} is an option of kind={other!r} and this is "
                    f"kind={self.kind!r}; leave it out or choose that kind"
                )
        if self.kind == "etc" and self.num_global is None:
            raise ValueError("bigbird: kind='etc' needs num_global, the tokens of the global stream, such as 64")

    @property
    def traits(self) -> Traits:
        """Both kinds look both ways; blocks and streams are laid over one document."""
        return Traits(bidirectional=True, padding=True)

    @property
    def padded_structure(self) -> str:
        """Of blocks alone; a global stream has none."""
        return "the last block and the random blocks" if self.kind == "itc" else ""

    @property
    def prepended_tokens(self) -> int:
        """The global stream."""
        return self.num_global or 0

    @property
    def global_local(self) -> GlobalLocalOptions:
        """The options of "etc"."""
        assert self.num_global is not None
        assert self.window is not None
        assert self.max_distance is not None
        assert self.sharing is not None
        assert self.share_output is not None
        return GlobalLocalOptions(
            num_global=self.num_global,
            radius=(self.window - 1) // 2,
            max_distance=self.max_distance,
            sharing=self.sharing,
            share_output=self.share_output,
        )

    def check(self, dims: Dims) -> None:
        """The relative positions of "etc" exclude others."""
        if self.kind == "etc" and dims.positions != "none":
            raise ValueError(
                f"bigbird: kind='etc' has relative positions of its own, got positions={dims.positions!r}; use 'none'"
            )

    def build(self, dims: Dims) -> TokenMixer:
        """The module."""
        return BigBird(self, dims) if self.kind == "itc" else GlobalLocalMixer(self, dims, self.global_local)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections and the visible pairs."""
        if self.kind == "etc":
            return global_local_cost(self.global_local, dims, length, dtype_bytes)
        pairs = _block_pairs(self, length)
        return projection_cost(dims, length, dtype_bytes) + attention_cost(dims, length, pairs, dtype_bytes)

    def pattern(self, length: int, *, layer: int, num_heads: int) -> Pattern:
        """itc: who attends whom among `length` tokens."""
        first_of_last = (length - 1) // self.block * self.block
        ends = {*range(min(self.block, length)), *range(first_of_last, length)}
        side = (self.window_blocks - 1) // 2
        common = Global(ends) | BlockWindow(self.block, side, side)
        if not self.num_random:
            return common
        seeds = [random_seed(self.seed, layer, head) for head in range(num_heads)]
        return common.heads(
            {h: common | Random(self.block, self.num_random, seed, exclude=common) for h, seed in enumerate(seeds)}
        )


def random_seed(seed: int, layer: int, head: int) -> int:
    """The seed of one head's random blocks: the three numbers as digits to the base 2**16."""
    return (seed * 2**16 + layer) * 2**16 + head


def _block_pairs(config: BigBirdConfig, length: int) -> int:
    """Visible pairs of a head: two global rows and columns of blocks, and between them window and random blocks."""
    blocks = -(-length // config.block)
    if blocks <= 2:
        return length**2
    inner, side = blocks - 2, (config.window_blocks - 1) // 2
    outer = length - inner * config.block  # tokens of the first and the last block
    if config.window_blocks + config.num_random <= inner:
        chosen = visible_pairs(inner, left=side, right=side) + inner * config.num_random
    else:
        reach = (min(t, side) + min(inner - 1 - t, side) + 1 for t in range(inner))
        chosen = sum(min(inner, near + config.num_random) for near in reach)
    return outer * length + (length - outer) * outer + chosen * config.block**2


class BigBird(HeadMixer):
    """Window, random and global blocks in one softmax."""

    config: BigBirdConfig

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """One pattern for all examples; padding is left out of it."""
        k, v = heads.keys_and_values()
        pattern = self.config.pattern(heads.q.shape[2], layer=self.dims.layer, num_heads=self.dims.num_heads)
        return pattern_attention(heads.q, k, v, pattern, mask=Mask(heads.mask.valid)), None
