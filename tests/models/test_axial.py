"""Axial positions: a grid's rows and columns in place of a vector for every position."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import batch, classifier, config
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import AxialPositionEmbeddings

from subquad.models import SubquadConfig, SubquadForSequenceClassification
from subquad.models.axial import AxialGrid, AxialPositions, axial_grid


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.data())
def test_a_vector_is_put_together_from_the_tables_of_the_sides(shape: list[int], data: st.DataObject) -> None:
    dims = data.draw(st.lists(st.integers(1, 4), min_size=len(shape), max_size=len(shape)))
    places = AxialPositions(AxialGrid(tuple(shape), tuple(dims)))
    positions = torch.arange(math.prod(shape))[None]
    found = places(positions)[0]
    for position in range(math.prod(shape)):
        rest, parts = position, []
        for side, table in reversed(list(zip(shape, places.tables, strict=True))):
            parts.insert(0, table[rest % side])
            rest //= side
        assert torch.equal(found[position], torch.cat(parts))


@pytest.mark.parametrize("length", [12, 7, 1])
def test_it_is_the_one_of_hugging_face(length: int) -> None:
    theirs = AxialPositionEmbeddings(
        ReformerConfig(
            axial_pos_shape=(3, 4),
            axial_pos_embds_dim=(2, 5),
            hidden_size=7,
            num_attention_heads=1,
            attn_layers=["local"],
        )
    ).eval()
    ours = AxialPositions(AxialGrid((3, 4), (2, 5)))
    with torch.no_grad():
        for table, weight in zip(ours.tables, theirs.weights, strict=True):
            weight.copy_(table.view_as(weight))
    positions = torch.arange(length).expand(2, -1)
    vectors = ours(positions)
    assert torch.equal(vectors, theirs(positions))
    upstream = torch.randn_like(vectors)
    expected = torch.autograd.grad((theirs(positions) * upstream).sum(), list(theirs.weights))
    for found, right in zip(torch.autograd.grad((vectors * upstream).sum(), list(ours.tables)), expected, strict=True):
        torch.testing.assert_close(found, right.view_as(found))


@given(st.integers(1, 100_000), st.integers(2, 64))
def test_the_grid_that_is_derived_holds_every_position_and_is_nearly_square(places: int, width: int) -> None:
    (rows, columns), dims = axial_grid(places=places, width=width, shape=None, dims=None)
    assert (rows - 1) * columns < places <= rows * columns
    assert columns - 2 <= rows <= columns
    assert sum(dims) == width
    assert max(dims) - min(dims) <= 1


def test_a_model_adds_them_to_its_tokens_and_begins_anew_in_every_document() -> None:
    model = classifier(positions="axial", pooling="mean", axial_pos_shape=[5, 8], axial_pos_embds_dim=[6, 10]).eval()
    tokens, _ = batch(rows=1)
    places = model.model.embedding.positions
    assert isinstance(places, AxialPositions)
    assert [tuple(table.shape) for table in places.tables] == [(5, 6), (8, 10)]
    segments = torch.tensor([[0] * 4 + [1] * 9])
    first = model.model(tokens, segment_ids=segments, output_hidden_states=True).hidden_states[0]
    expected = model.get_input_embeddings()(tokens) + places(torch.tensor([[*range(4), *range(9)]]))
    torch.testing.assert_close(first, expected)


def test_the_vector_of_classification_has_a_place_of_its_own() -> None:
    places = classifier(positions="axial", max_position_embeddings=36).model.embedding.positions
    assert isinstance(places, AxialPositions)
    assert places.grid.shape == (6, 7)
    with pytest.raises(ValueError, match=r"axial_pos_shape=\[6, 6\] has 36 places, but there are 37 positions"):
        classifier(positions="axial", max_position_embeddings=36, axial_pos_shape=[6, 6])
    classifier(positions="axial", max_position_embeddings=36, axial_pos_shape=[6, 6], pooling="mean")


class TestDropout:
    """In training an example loses whole rows and whole columns of the grid, and what is left is scaled up."""

    def test_it_takes_rows_and_columns_and_nothing_else(self) -> None:
        places = AxialPositions(AxialGrid((5, 6), (3, 4)), dropout=0.5).train()
        with torch.no_grad():
            for table in places.tables:
                table.fill_(1.0)
        vectors = places(torch.arange(30).expand(40, -1)).unflatten(1, (5, 6))
        rows, columns = vectors[..., :3], vectors[..., 3:]
        assert torch.equal(rows, rows[:, :, :1, :1].expand_as(rows))  # the same in all columns and channels
        assert torch.equal(columns, columns[:, :1, :, :1].expand_as(columns))
        for kept in (rows[:, :, 0, 0], columns[:, 0, :, 0]):
            assert set(kept.unique().tolist()) == {0.0, 2.0}
            assert not torch.equal(kept, kept[:1].expand_as(kept))  # every example loses others
            assert float(kept.detach().mean()) == pytest.approx(1.0, abs=0.4)

    def test_evaluation_drops_nothing(self) -> None:
        places = AxialPositions(AxialGrid((5, 6), (3, 4)), dropout=0.5).eval()
        positions = torch.arange(30)[None]
        whole = AxialPositions(places.grid)
        whole.load_state_dict(places.state_dict())
        assert torch.equal(places(positions), whole(positions))

    def test_a_model_drops_them_at_its_own_rate(self) -> None:
        model = classifier(positions="axial", pooling="mean", axial_pos_dropout=0.5).train()
        assert model.config.dropout == 0
        tokens, _ = batch(rows=1)
        first, second = (model.model(tokens).last_hidden_state for _ in range(2))
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("rate", [-0.1, 1.0])
    def test_a_rate_that_is_none_is_refused(self, rate: float) -> None:
        with pytest.raises(ValueError, match=rf"axial_pos_dropout must be in \[0, 1\), got {rate}"):
            config(positions="axial", axial_pos_dropout=rate)

    def test_a_rate_without_axial_positions_is_refused(self) -> None:
        with pytest.raises(ValueError, match="axial_pos_dropout goes with positions='axial', got positions='learned'"):
            config(positions="learned", axial_pos_dropout=0.1)


def test_they_end_where_the_config_says() -> None:
    model = classifier(positions="axial", axial_pos_shape=[8, 8])
    model(torch.ones(1, 40, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"reaches 41 tokens, but .* max_position_embeddings=40; raise it"):
        model(torch.ones(1, 41, dtype=torch.int64))


def test_a_saved_model_gives_the_same_logits(tmp_path: Path) -> None:
    model, (tokens, attention) = classifier(positions="axial", axial_pos_embds_dim=[4, 12]), batch()
    model.save_pretrained(tmp_path)
    loaded = SubquadForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.axial_pos_embds_dim == [4, 12]
    assert torch.equal(loaded(tokens, attention).logits, model(tokens, attention).logits)


def test_fresh_tables_are_random() -> None:
    torch.manual_seed(0)
    fresh = SubquadForSequenceClassification(config(positions="axial", hidden_size=64, max_position_embeddings=900))
    places = fresh.model.embedding.positions
    assert isinstance(places, AxialPositions)
    for table in places.tables:
        assert float(table.detach().std()) == pytest.approx(1.0, abs=0.1)


def test_the_config_survives_its_written_form() -> None:
    written = config(positions="axial", axial_pos_shape=[5, 8], axial_pos_embds_dim=[6, 10]).to_dict()
    again = SubquadConfig.from_dict(written)
    assert (again.axial_pos_shape, again.axial_pos_embds_dim) == ([5, 8], [6, 10])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axial_pos_shape": [4, 9]}, r"axial_pos_shape=\[4, 9\] has 36 places, but there are 40 positions"),
        ({"axial_pos_shape": [0, 9]}, r"axial_pos_shape must be a list of whole numbers of at least 1, got \[0, 9\]"),
        ({"axial_pos_shape": []}, r"axial_pos_shape must be a list of whole numbers of at least 1, got \[\]"),
        ({"axial_pos_embds_dim": [4, 13]}, r"sum up to hidden_size=16, got \[4, 13\] with sum 17"),
        ({"axial_pos_embds_dim": [4, 4, 8]}, r"a number for each side of \[6, 7\]"),
        ({"axial_pos_shape": [2] * 20}, "hidden_size=16 is less than a channel for each of 20 sides"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_when_the_config_is_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(positions="axial", **changes)


def test_a_grid_without_axial_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="axial_pos_shape goes with positions='axial', got positions='learned'"):
        config(positions="learned", axial_pos_shape=[5, 8])
