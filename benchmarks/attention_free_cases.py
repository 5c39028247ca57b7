"""The mechanisms without attention that `attention_free.py` times, and the products that they consist of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from attention_rows import BATCH, HEADS, WIDTH, Inputs, dense_causal, step
from torch import Tensor

from subquad.build import build_mixer
from subquad.mechanisms.aft import Aft
from subquad.mechanisms.gmlp import Gmlp
from subquad.mechanisms.r_transformer import LocalNetwork, RTransformer
from subquad.ops.local_recurrence.network import GATES, CellName
from subquad.ops.means.biased_means import biased_means
from subquad.ops.means.strip_geometry import strips
from subquad.ops.onednn import product

EMBED_DIM = HEADS * WIDTH
WINDOW = 7
"""Tokens that a local network reads."""

Step = Callable[[], object]


class Product(NamedTuple):
    """A product of (M, K) and (K, N) that runs `repeats` times."""

    rows: int
    inner: int
    columns: int
    repeats: int = 1

    @property
    def flops(self) -> int:
        """Forward."""
        return 2 * self.repeats * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: as on the command line.
        method: a step of it, forward and backward, for a length.
        target: how many times faster than dense attention it is to be; or how many times the time of its products it
            may take at most.
        products: that it consists of, for a length; None for what is held against dense attention.
    """

    name: str
    method: Callable[[int], Step]
    target: float
    products: Callable[[int], list[Product]] | None = None

    def baseline(self, length: int) -> tuple[str, Step]:
        """What it is held against, and its name."""
        if self.products is None:
            return "causal dense", partial(step, dense_causal, Inputs.draw(length))
        return f"products of {self.name}", products_step(self.products(length))


def products_step(products: list[Product]) -> Step:
    """Every product at once, and two more of its size as in a backward pass."""
    drawn = [(torch.rand(m, k), torch.rand(n, k), torch.rand(m, n), repeats) for m, k, n, repeats in products]

    def run() -> None:
        for a, b, upstream, repeats in drawn:
            for _ in range(repeats):
                product(a, b)
                product(upstream, b.mT)
                product(upstream.mT, a.mT)

    return run


def aft(length: int, kind: Literal["full", "local", "simple"], *, causal: bool) -> Aft:
    """AFT; local reaches 128 tokens."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"window": 128} if kind == "local" else {}
    mixer = build_mixer(
        "aft", embed_dim=EMBED_DIM, num_heads=HEADS, causal=causal, max_length=length, kind=kind, **options
    )
    assert isinstance(mixer, Aft)
    return mixer


def aft_step(length: int, kind: Literal["full", "local", "simple"], *, causal: bool) -> Step:
    """What AFT runs between its projections; positions get gradients too."""
    mixer = aft(length, kind, causal=causal)
    inputs = Inputs(*(x.detach().reshape(BATCH, 1, length, EMBED_DIM) for x in Inputs.draw(length)))
    for leaf in inputs[:3]:
        leaf.requires_grad_()

    def means(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = None if mixer.positions is None else mixer.positions.bias(None, length, 0)
        return biased_means(q, k, v, bias, mixer.config.reach(causal=causal))

    return partial(step, means, inputs)


def aft_products(length: int, *, causal: bool) -> list[Product]:
    """Biases, and their exponentials times values and weights, in the strips of queries that the mixer takes."""
    config = aft(length, "full", causal=causal).config
    found: list[Product] = []
    for strip in strips(length, length, config.reach(causal=causal)):
        rows, columns = strip.queries.stop - strip.queries.start, strip.columns.stop
        found += [Product(rows, config.rank, columns), Product(rows, columns, 2 * EMBED_DIM)]
    return found


def gmlp_step(length: int) -> Step:
    """The whole block, bidirectional."""
    torch.manual_seed(0)
    mixer = build_mixer("gmlp", embed_dim=EMBED_DIM, num_heads=HEADS, max_length=length)
    assert isinstance(mixer, Gmlp)
    return _module_step(lambda x: mixer(x).y, length)


def gmlp_products(length: int) -> list[Product]:
    """Two projections and the matrix over positions between them."""
    half = 3 * EMBED_DIM
    into, out = Product(length, EMBED_DIM, 2 * half), Product(length, half, EMBED_DIM)
    return [into, Product(length, length, half), out]


def local_step(length: int, cell: CellName) -> Step:
    """A local network of R-Transformer with its norm and its projection."""
    torch.manual_seed(0)
    mixer = build_mixer("r_transformer", embed_dim=EMBED_DIM, num_heads=HEADS, causal=True, cell=cell, window=WINDOW)
    assert isinstance(mixer, RTransformer)
    (network,) = mixer.local_networks
    assert isinstance(network, LocalNetwork)
    return _module_step(lambda x: network(x, None)[0], length)


def local_products(length: int, cell: CellName) -> list[Product]:
    """One for the tokens and one for each step but the first, whose state is 0."""
    gates = GATES[cell] * EMBED_DIM
    return [Product(length + WINDOW - 1, EMBED_DIM, gates), Product(length, EMBED_DIM, gates, WINDOW - 1)]


def _module_step(run: Callable[[Tensor], Tensor], length: int) -> Step:
    """Forward and backward; the parameters' gradients add up."""
    x, upstream = (torch.randn(BATCH, length, EMBED_DIM, generator=torch.Generator().manual_seed(i)) for i in range(2))
    x.requires_grad_()
    return lambda: run(x).backward(upstream)


def _local_case(cell: CellName) -> Case:
    return Case(cell, partial(local_step, cell=cell), 2.0, partial(local_products, cell=cell))


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("aft-simple", partial(aft_step, kind="simple", causal=True), 8.0),
        Case("aft-local", partial(aft_step, kind="local", causal=True), 4.0),
        Case("aft-full", partial(aft_step, kind="full", causal=False), 1.3, partial(aft_products, causal=False)),
        Case("aft-full-causal", partial(aft_step, kind="full", causal=True), 1.3, partial(aft_products, causal=True)),
        Case("gmlp", gmlp_step, 1.3, gmlp_products),
        _local_case("rnn"),
        _local_case("gru"),
        _local_case("lstm"),
    )
}
