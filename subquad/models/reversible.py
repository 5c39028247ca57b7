"""Reversible residuals: the backward pass computes a layer's input from its output, so that none has to be kept.

Gomez et al. 2017, "The Reversible Residual Network", arXiv:1707.04585; for Transformers Kitaev et al. 2020, "Reformer:
The Efficient Transformer", arXiv:2001.04451, section 3.

    y1 = x1 + F(x2)    y2 = x2 + G(y1)        x2 = y2 - G(y1)    x1 = y1 - F(x2)

F is the token mixer behind its norm, G the feed-forward behind its own. Both are one rule: a sublayer f takes the
streams (a, b) to (b, a + f(b)), and (b, c) is taken back to (c - f(b), b). So layers without feed-forward are
reversible too: their mixers serve the streams in turn.

Cost: one more forward pass, inside the backward; kept are two streams and, of each sublayer, its random state and its
choices (`replay.py`). Streams are float32 or wider, whatever the sublayers compute in: rounding grows with the depth.

Departures: both streams start as the embedding, as in the official code; they end as their mean, so that everything
behind the stack is as for a standard one. The paper leaves it open; the official code goes on with both, of width 2 D:
`reversible_join="concat"`. A sum is told from a mean, behind the final norm, by that norm's ε alone.
There is no length below which layers fall back on ordinary residuals, as some code has: a choice by length would change
what is kept, and how sums are rounded, from batch to batch; `residual="standard"` is that choice, for all. The paper
also cuts the feed-forward, and the loss over a large vocabulary, into chunks: `feedforward_chunk` and `loss_chunk`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from subquad.build import list_mixers
from subquad.interface import Mixed
from subquad.models.block import Block, LayerStates, add_losses
from subquad.models.replay import Replay
from subquad.models.stack import StackInputs, StackOutput
from subquad.ops.precision import wide_dtype
from subquad.registry import MIXERS
from subquad.state import State


class Sublayer(NamedTuple):
    """A function of one stream (B, L, D), what it adds to the other.

    Attributes:
        modules: that it runs, and whose parameters it reads.
        mix: the function, of the stream and of what is in `reads`.
        reads: tensors that it reads besides, and through which gradients flow: the context of a cross mixer.
    """

    modules: tuple[nn.Module, ...]
    mix: Callable[..., Mixed]
    reads: tuple[Tensor, ...] = ()


class Streams(NamedTuple):
    """The two streams (B, L, D), the one that is read next at the end, and what has come out beside them so far.

    Attributes:
        first: read after the next sublayer.
        second: read by the next sublayer.
        aux_loss: sum of the auxiliary losses.
        states: new states of the sublayers that were given one, in their order.
    """

    first: Tensor
    second: Tensor
    aux_loss: Tensor | None = None
    states: tuple[State, ...] = ()


Join = Callable[[Tensor, Tensor], Tensor]
"""What two streams (B, L, D) become at the end: (B, L, D) or (B, L, 2 D)."""

JOINS: Mapping[str, Join] = {
    "mean": lambda first, second: (first + second) / 2,
    "sum": torch.add,
    "concat": lambda first, second: torch.cat((first, second), dim=-1),
}


def couple(sublayers: Sequence[Sublayer], streams: Streams) -> Streams:
    """The definition: every sublayer reads one stream and adds to the other, which is read next."""
    first, second, aux_loss, states = streams
    for sublayer in sublayers:
        mixed = sublayer.mix(second, *sublayer.reads)
        first, second = second, first + mixed.y
        aux_loss = add_losses(aux_loss, mixed.aux_loss)
        states = states if mixed.state is None else (*states, mixed.state)
    return Streams(first, second, aux_loss, states)


def couple_reversibly(sublayers: Sequence[Sublayer], streams: Streams) -> Streams:
    """The same, in values and gradients; keeps the last streams instead of what happens in the sublayers.

    Whatever a sublayer reads besides its stream, its `reads` and the parameters of its modules is taken as constant.
    There is no second derivative.
    """
    inputs = _inputs(sublayers)
    first, second, aux_loss = _Reversible.apply(tuple(sublayers), streams.first, streams.second, *inputs)
    return Streams(first, second, add_losses(streams.aux_loss, aux_loss))


def run_reversibly(blocks: nn.ModuleList, x: Tensor, given: StackInputs, *, join: Join = JOINS["mean"]) -> StackOutput:
    """The stream x (B, L, D) through all blocks, with reversible residuals.

    States can't be gone back to: with them autograd keeps what it keeps of ordinary layers.

    Returns:
        What the streams between layers and at the end are joined to has the dtype of x.

    Raises:
        ValueError: the streams between the blocks are asked for where gradients are computed.
    """
    if given.collect and torch.is_grad_enabled():
        raise ValueError(
            "output_hidden_states=True keeps the stream between all layers, which residual='reversible' is there to "
            "avoid; ask for it under torch.no_grad(), or use residual='standard'"
        )

    def joined(streams: Streams) -> Tensor:
        return join(streams.first, streams.second).to(x.dtype)

    wide = x.to(wide_dtype(x))
    streams = Streams(wide, wide)
    if torch.is_grad_enabled() and given.states is None:
        sublayers = [sublayer for block in blocks for sublayer in sublayers_of(block, given)]
        streams = couple_reversibly(sublayers, streams)
        return StackOutput(joined(streams), [], streams.aux_loss, [])
    collected, new_states = [joined(streams)] if given.collect else [], []
    for block, states in given.of_layers(blocks):
        streams = couple(sublayers_of(block, given, states), streams)
        if given.collect:
            collected.append(joined(streams))
        if streams.states:
            new_states.append(LayerStates(*streams.states))
            streams = streams._replace(states=())
    return StackOutput(joined(streams), collected, streams.aux_loss, new_states)


def sublayers_of(block: nn.Module, given: StackInputs, states: LayerStates | None = None) -> list[Sublayer]:
    """The token mixer of a block, its cross mixer and its feed-forward, where it has them, each behind its norm."""
    assert isinstance(block, Block)
    mask, own = given.mask, None if states is None else states.own
    reads = () if given.context is None else (given.context,)
    mix: list[tuple[nn.LayerNorm | None, nn.Module | None, Callable[..., Mixed], tuple[Tensor, ...]]] = [
        (block.mixer_norm, block.mixer, lambda x: block.mixer(x, mask=mask, state=own), ()),
        (
            block.cross_norm,
            block.cross_mixer,
            lambda x, context=None: block.cross_mix(x, mask, states, context, given.context_facts),
            reads,
        ),
        (block.feedforward_norm, block.feedforward, lambda x: block.feed_forward(x, mask), ()),
    ]
    return [
        _behind_norm(norm, module, call, of_call)
        for norm, module, call, of_call in mix
        if norm is not None and module is not None
    ]


def _behind_norm(
    norm: nn.LayerNorm, module: nn.Module, call: Callable[..., Mixed], reads: tuple[Tensor, ...]
) -> Sublayer:
    return Sublayer((norm, module), lambda stream, *read: call(norm(stream.to(norm.weight.dtype)), *read), reads)


def check_reversible(blocks: nn.ModuleList) -> None:
    """Refuse mixers that own their residual.

    Raises:
        ValueError: naming the mixer, and those that can be reversible.
    """
    for block in blocks:
        assert isinstance(block, Block)
        if block.mixer.config.placement == "block":
            able = ", ".join(name for name in list_mixers() if MIXERS.lookup(name).placement == "sublayer")
            raise ValueError(
                f"{block.mixer.config.name}: owns its residual, so residual='reversible' can't take it apart; use "
                f"residual='standard', or one of {able}"
            )


def _inputs(sublayers: Sequence[Sublayer]) -> list[Tensor]:
    """What sublayers read besides the streams, parameters included, each once, however many share it."""
    modules = (module for sublayer in sublayers for module in sublayer.modules)
    parameters = (parameter for module in modules for parameter in module.parameters())
    return list(dict.fromkeys([*(tensor for sublayer in sublayers for tensor in sublayer.reads), *parameters]))


class _Reversible(torch.autograd.Function):
    """All sublayers as one node of the graph; what they read are inputs of it, so that its gradients are results."""

    @staticmethod
    def forward(
        ctx: Any, sublayers: tuple[Sublayer, ...], first: Tensor, second: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        aux_loss, runs, kept = None, [], []
        for sublayer in sublayers:
            replay = Replay(sublayer.modules, second)
            with replay.record():
                mixed = sublayer.mix(second, *sublayer.reads)
            first, second = second, first + mixed.y
            aux_loss = add_losses(aux_loss, mixed.aux_loss)
            tensors = replay.tensors()
            runs.append((sublayer, replay, len(tensors)))
            kept += tensors
        ctx.runs, ctx.inputs = runs, inputs
        ctx.versions = [tensor._version for tensor in inputs]
        ctx.save_for_backward(first, second, *kept)
        return first, second, aux_loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad_first: Tensor, grad_second: Tensor, grad_loss: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _check_unchanged(ctx.runs, ctx.inputs, ctx.versions)
        first, second, *kept = ctx.saved_tensors
        gradients: dict[Tensor, Tensor] = {}
        for sublayer, replay, count in reversed(ctx.runs):
            kept, tensors = kept[: len(kept) - count], kept[len(kept) - count :]
            copies = {tensor: tensor.detach().requires_grad_(tensor.requires_grad) for tensor in sublayer.reads}
            with torch.enable_grad(), replay.again(tensors):
                read = first.detach().requires_grad_()
                mixed = sublayer.mix(read, *copies.values())
                added = mixed.y.to(second.dtype)
            first, second = second - added.detach(), first
            trained = [tensor for tensor in _inputs([sublayer]) if tensor.requires_grad]
            outputs = (
                {added: grad_second} if mixed.aux_loss is None else {added: grad_second, mixed.aux_loss: grad_loss}
            )
            grad_read, *found = _gradients(outputs, [read, *(copies.get(tensor, tensor) for tensor in trained)])
            grad_first, grad_second = grad_second, grad_first if grad_read is None else grad_first + grad_read
            for tensor, gradient in zip(trained, found, strict=True):
                if gradient is not None:
                    gradients[tensor] = gradients[tensor] + gradient if tensor in gradients else gradient
        return None, grad_first, grad_second, *(gradients.get(tensor) for tensor in ctx.inputs)


def _gradients(outputs: Mapping[Tensor, Tensor | None], inputs: list[Tensor]) -> Sequence[Tensor | None]:
    """Gradients of the inputs, given those of the outputs; None where no output depends on an input."""
    dependent = {output: gradient for output, gradient in outputs.items() if output.requires_grad}
    if not dependent:
        return [None] * len(inputs)
    return torch.autograd.grad(list(dependent), inputs, list(dependent.values()), allow_unused=True)


def _check_unchanged(
    runs: Sequence[tuple[Sublayer, Replay, int]], inputs: Sequence[Tensor], versions: Sequence[int]
) -> None:
    now = _inputs([sublayer for sublayer, _, _ in runs])
    same = len(now) == len(inputs) and all(a is b for a, b in zip(now, inputs, strict=True))
    if not same or [tensor._version for tensor in inputs] != versions:
        raise RuntimeError(
            "residual='reversible' computes the layers again in the backward pass, but their parameters have changed "
            "since the forward pass; call backward before the parameters are updated or exchanged"
        )
