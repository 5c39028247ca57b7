"""BigBird's block form: window, random and global blocks in one softmax, a fixed draw, and the released code."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from comparison import (
    assert_same_values_and_gradients,
    attend_by_loops,
    disturbed,
    finish,
    is_valid,
    masks,
    qkv,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BigBirdConfig as PeerConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

from subquad import Mask
from subquad.build import build_mixer, cost, make_dims, mixer_config
from subquad.layers.heads import projection_cost
from subquad.mechanisms.bigbird import BigBird, BigBirdConfig, random_seed
from subquad.ops.pattern.attention import pattern_attention
from subquad.patterns.blocks import Random
from subquad.patterns.pattern import Pattern


def bigbird(**form: Any) -> BigBird:
    mixer = build_mixer("bigbird", embed_dim=form.pop("embed_dim", 4), num_heads=2, **form)
    assert isinstance(mixer, BigBird)
    disturbed(mixer)
    return mixer


def config_of(**options: Any) -> BigBirdConfig:
    config = mixer_config("bigbird", **options)
    assert isinstance(config, BigBirdConfig)
    return config


def visible_blocks(config: BigBirdConfig, length: int, *, layer: int = 0, num_heads: int = 2) -> Tensor:
    """Bool (H, N, N): of each block of pairs, whether its first pair is visible."""
    dense = config.pattern(length, layer=layer, num_heads=num_heads).dense(length).expand(num_heads, -1, -1)
    return dense[:, :: config.block, :: config.block]


def seen_without_randomness(config: BigBirdConfig, blocks: int, row: int, column: int) -> bool:
    ends, side = {0, blocks - 1}, (config.window_blocks - 1) // 2
    return row in ends or column in ends or abs(row - column) <= side


def random_blocks(config: BigBirdConfig, length: int, *, layer: int = 0, num_heads: int = 2) -> list[list[set[int]]]:
    """Of each head, of each row of blocks: the blocks that only randomness makes visible."""
    found = visible_blocks(config, length, layer=layer, num_heads=num_heads)
    blocks = range(found.shape[1])
    return [
        [
            {c for c in blocks if found[head, r, c] and not seen_without_randomness(config, len(blocks), r, c)}
            for r in blocks
        ]
        for head in range(num_heads)
    ]


def definition(mixer: BigBird, x: Tensor, mask: Mask | None) -> Tensor:
    config, length = mixer.config, x.shape[1]
    blocks = -(-length // config.block)
    drawn = random_blocks(config, length, layer=mixer.dims.layer)
    heads = []
    for head, of_head in enumerate(drawn):

        def sees(b: int, i: int, j: int, chosen: list[set[int]] = of_head) -> bool:
            row, column = i // config.block, j // config.block
            seen = seen_without_randomness(config, blocks, row, column) or column in chosen[row]
            return seen and is_valid(mask, b, j)

        q, k, v = (tensor[:, :, head : head + 1] for tensor in qkv(mixer, x))
        heads.append(attend_by_loops(q, k, v, sees))
    return finish(mixer, torch.cat(heads, dim=2), mask)


SIZES: dict[str, Any] = {
    "block": st.sampled_from([1, 2, 3, 5]),
    "window_blocks": st.sampled_from([1, 3, 5]),
    "num_random": st.sampled_from([0, 1, 2, 9]),
}


@given(length=st.sampled_from([1, 2, 5, 6, 7, 16, 17]), data=st.data(), **SIZES)
def test_it_equals_the_definition(length: int, data: st.DataObject, **sizes: int) -> None:
    mixer, mask = bigbird(**sizes, layer=3), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@given(length=st.integers(1, 60), **SIZES)
def test_a_row_sees_the_named_blocks_and_its_number_of_random_ones(length: int, **sizes: int) -> None:
    config = config_of(**sizes)
    found = visible_blocks(config, length)
    blocks = found.shape[1]
    for head in found:
        for row in range(blocks):
            named = {column for column in range(blocks) if seen_without_randomness(config, blocks, row, column)}
            seen = set(head[row].nonzero()[:, 0].tolist())
            assert named <= seen
            assert len(seen) == min(blocks, len(named) + config.num_random)


@given(length=st.integers(0, 90), **SIZES)
def test_the_price_counts_the_visible_pairs(length: int, **sizes: int) -> None:
    config, dims = config_of(**sizes), make_dims(embed_dim=4, num_heads=2)
    pairs = int(config.pattern(length, layer=0, num_heads=2).dense(length).sum()) if length else 0
    heads = max(1, config.pattern(length, layer=0, num_heads=2).num_heads) if length else 1
    attention = config.cost(dims, length, 4).flops - projection_cost(dims, length, 4).flops
    assert attention == 4 * dims.inner_dim * pairs // heads


def test_the_price_of_a_middle_row_is_the_papers() -> None:
    once, twice = (cost("bigbird", length=2**20 + 64 * n, embed_dim=8, num_heads=2).flops for n in (0, 1))
    dims = make_dims(embed_dim=8, num_heads=2)
    pairs = 64 * (5 + 3) * 64 + 2 * 64 * 64  # a row of blocks, and what it adds to the two global rows
    assert twice - once == projection_cost(dims, 64, 4).flops + 4 * 8 * pairs


class TestRandomBlocks:
    """One draw for each layer and head, everywhere and always the same."""

    def test_they_differ_by_head_layer_and_seed(self) -> None:
        config = config_of(block=2)
        first, second = random_blocks(config, 64)
        assert first != second
        assert random_blocks(config, 64, layer=1)[0] not in (first, second)
        assert random_blocks(config_of(block=2, seed=1), 64)[0] not in (first, second)

    def test_no_two_of_seed_layer_and_head_share_a_generator(self) -> None:
        seeds = {random_seed(seed, layer, head) for seed in range(4) for layer in range(9) for head in range(9)}
        assert len(seeds) == 4 * 9 * 9

    def test_they_are_the_same_in_every_process(self) -> None:
        table = visible_blocks(config_of(block=2, seed=5), 64, layer=2).numpy()
        digest = hashlib.sha256(np.packbits(table).tobytes()).hexdigest()
        assert digest[:16] == "f1787e9f4d982a6e"

    def test_they_reach_the_whole_sequence(self) -> None:
        rows = random_blocks(config_of(block=1, num_random=12), 120, num_heads=1)[0]
        assert set().union(*rows) == set(range(1, 119))

    def test_they_are_the_same_in_training_and_evaluation_and_draw_from_no_global_generator(self) -> None:
        mixer, x = bigbird(block=2), torch.randn(1, 40, 4, dtype=torch.float64)
        before = torch.get_rng_state()
        np.random.seed(3)
        assert torch.equal(mixer.train()(x).y, mixer.eval()(x).y)
        assert torch.equal(torch.get_rng_state(), before)
        assert np.random.random() == np.random.RandomState(3).random()

    def test_the_config_alone_brings_them_back(self) -> None:
        mixer, x = bigbird(block=2, seed=7, layer=4), torch.randn(1, 40, 4, dtype=torch.float64)
        written = mixer.config.to_dict()
        again = build_mixer(written.pop("name"), embed_dim=4, num_heads=2, layer=4, **written).double()
        again.load_state_dict(mixer.state_dict())
        assert torch.equal(again(x).y, mixer(x).y)


@pytest.mark.parametrize("length", [1, 4, 12, 28])
def test_a_sequence_of_few_blocks_is_dense_attention(length: int) -> None:
    mixer, x = bigbird(block=4), torch.randn(2, length, 4, dtype=torch.float64)
    dense = build_mixer("full", embed_dim=4, num_heads=2).double()
    dense.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x).y, dense(x).y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "bigbird: block must be at least 1, got 0"),
        ({"num_random": -1}, "bigbird: num_random must be at least 0, got -1"),
        ({"window_blocks": 2}, "window_blocks counts both sides and its middle, so it must be odd; got 2, use 1 or 3"),
        ({"kind": "etc", "num_global": 4, "window": 6}, "window counts .* must be odd; got 6, use 5 or 7"),
        ({"kind": "etc", "num_global": 0}, "bigbird: num_global must be at least 1, got 0"),
        ({"kind": "etc"}, "bigbird: kind='etc' needs num_global, the tokens of the global stream"),
        ({"num_global": 4}, "num_global=4 is an option of kind='etc' and this is kind='itc'; leave it out or choose"),
        ({"window": 129}, "window=129 is an option of kind='etc' and this is kind='itc'"),
        ({"kind": "etc", "num_global": 4, "num_random": 0}, "num_random=0 is an option of kind='itc' and this is"),
        ({"kind": "its"}, "option 'kind' must be one of 'itc', 'etc', got 'its'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixer_config("bigbird", **options)


@dataclass(frozen=True)
class Table(Pattern):
    """Blocks of pairs, written out."""

    size: int
    rows: tuple[tuple[bool, ...], ...]

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return torch.tensor(self.rows)[i // self.size, j // self.size]


class TestAgainstTheReleasedImplementation:
    """Hugging Face's port of the official code, with our weights; it draws its random blocks from few candidates."""

    BLOCK, RANDOM, LENGTH = 4, 2, 48
    BLOCKS = LENGTH // BLOCK

    @pytest.fixture
    def mixer(self) -> BigBird:
        return bigbird(embed_dim=16, block=self.BLOCK, num_random=self.RANDOM, layer=1)

    @pytest.fixture
    def peer(self, mixer: BigBird) -> BigBirdBlockSparseAttention:
        config = PeerConfig(
            hidden_size=16, num_attention_heads=2, block_size=self.BLOCK, num_random_blocks=self.RANDOM, use_bias=True
        )
        peer = BigBirdBlockSparseAttention(config, seed=1).double()
        pairs = (
            (peer.query, mixer.project_query),
            (peer.key, mixer.project_key),
            (peer.value, mixer.project_value),
        )
        for theirs, ours in pairs:
            theirs.load_state_dict(ours.state_dict())
        return peer

    @pytest.fixture
    def x(self) -> Tensor:
        return torch.randn(2, self.LENGTH, 16, dtype=torch.float64)

    def call(self, peer: nn.Module, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """What the peer's heads read, (B, L, D)."""
        valid = torch.ones(x.shape[:2], dtype=torch.bool) if valid is None else valid
        blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(valid.double(), self.BLOCK)
        return peer(x, band, rows, columns, blocked, blocked)[0]

    def plan_in_training(self, peer: BigBirdBlockSparseAttention) -> list[np.ndarray]:
        """The peer's random blocks of the rows 1..N-2, for each head."""
        np.random.seed(1)
        plan = peer._get_rand_attn_plan(self.LENGTH, self.BLOCK, self.RANDOM)
        return list(
            peer.train()._bigbird_block_rand_mask_with_head(self.LENGTH, self.LENGTH, self.BLOCK, self.BLOCK, 2, *plan)
        )

    @pytest.mark.parametrize("lengths", [[48, 48], [48, 33], [9, 48]])
    def test_with_our_random_blocks_it_gives_our_result(
        self,
        mixer: BigBird,
        peer: BigBirdBlockSparseAttention,
        x: Tensor,
        lengths: list[int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        drawn = [
            np.array([sorted(row) for row in of_head[1:-1]])
            for of_head in random_blocks(mixer.config, self.LENGTH, layer=1)
        ]
        assert drawn[0].shape == (self.BLOCKS - 2, self.RANDOM)
        monkeypatch.setattr(peer, "_bigbird_block_rand_mask_with_head", lambda **sizes: drawn)
        valid = Mask.from_lengths(lengths, self.LENGTH).valid
        assert valid is not None
        expected = mixer.project_out(self.call(peer, x, valid))
        torch.testing.assert_close(mixer(x, mask=Mask(valid)).y[valid], expected[valid], rtol=1e-12, atol=1e-12)

    def test_with_its_random_blocks_of_training_pattern_attention_gives_its_result(
        self, mixer: BigBird, peer: BigBirdBlockSparseAttention, x: Tensor
    ) -> None:
        heads = {}
        for head, drawn in enumerate(self.plan_in_training(peer)):
            table = torch.tensor(
                [
                    [seen_without_randomness(mixer.config, self.BLOCKS, r, c) for c in range(self.BLOCKS)]
                    for r in range(self.BLOCKS)
                ]
            )
            table[torch.arange(1, self.BLOCKS - 1)[:, None], torch.from_numpy(drawn).long()] = True
            heads[head] = Table(self.BLOCK, tuple(map(tuple, table.tolist())))
        q, k, v = (tensor.transpose(1, 2) for tensor in qkv(mixer, x))
        ours = pattern_attention(q, k, v, heads[0].heads(heads)).transpose(1, 2).flatten(2)
        torch.testing.assert_close(ours, self.call(peer.train(), x), rtol=1e-12, atol=1e-12)

    def test_in_evaluation_it_counts_block_0_again_for_every_random_block(
        self, mixer: BigBird, peer: BigBirdBlockSparseAttention, x: Tensor
    ) -> None:
        """Dense attention with the logarithm of how often a key is counted added to its score."""
        block = torch.arange(self.LENGTH) // self.BLOCK
        ends = (block == 0) | (block == self.BLOCKS - 1)
        counts = (ends[:, None] | ends | ((block[:, None] - block).abs() <= 1)).double()
        counts[torch.outer(~ends, block == 0)] += self.RANDOM
        q, k, v = (tensor.transpose(1, 2) for tensor in qkv(mixer, x))
        expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=counts.log())
        theirs = self.call(peer.eval(), x)
        torch.testing.assert_close(theirs, expected.transpose(1, 2).flatten(2), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(mixer.project_out(theirs), mixer(x).y)

    def test_its_random_blocks_reach_the_first_ones_alone(self, peer: BigBirdBlockSparseAttention) -> None:
        assert max(int(drawn.max()) for drawn in self.plan_in_training(peer)) < 2 * self.RANDOM + 5 < self.BLOCKS - 2
        legal = Random(1, self.RANDOM, seed=0)
        assert bool(legal.dense(self.BLOCKS)[:, 2 * self.RANDOM + 5 :].any())
