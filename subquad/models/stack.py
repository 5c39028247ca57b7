"""All layers, one after the other, with ordinary residuals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from subquad.mask import Mask
from subquad.models.block import NO_CONTEXT, Block, ContextFacts, LayerStates, add_losses, layers_of


class StackInputs(NamedTuple):
    """What the layers are given beside the stream.

    Attributes:
        mask: facts about the tokens of the stream.
        states: of every layer, to go on from; None without.
        context: (B, S, D), the encoder's result.
        context_facts: what goes with the context.
        collect: whether the streams between the layers are wanted.
    """

    mask: Mask | None = None
    states: Sequence[LayerStates] | None = None
    context: Tensor | None = None
    context_facts: ContextFacts = NO_CONTEXT
    collect: bool = False

    def of_layers(self, blocks: nn.ModuleList) -> Iterable[tuple[Block, LayerStates | None]]:
        """Every layer with its states."""
        states = [None] * len(blocks) if self.states is None else self.states
        return zip(layers_of(blocks), states, strict=True)


class StackOutput(NamedTuple):
    """What comes out of all layers.

    Attributes:
        x: the stream (B, L, D) at the end.
        collected: the streams before each layer and at the end, where they were wanted.
        aux_loss: sum of the auxiliary losses, or None.
        states: the new states, when some were given.
    """

    x: Tensor
    collected: list[Tensor]
    aux_loss: Tensor | None
    states: list[LayerStates]


def run_blocks(blocks: nn.ModuleList, x: Tensor, given: StackInputs) -> StackOutput:
    """The stream x (B, L, D) through all blocks."""
    collected, aux_loss, states = [x], None, []
    for block, of_block in given.of_layers(blocks):
        x, block_loss, new_states = block(
            x, given.mask, of_block, given.context, given.context_facts, block.call_buffers()
        )
        aux_loss = add_losses(aux_loss, block_loss)
        if given.collect:
            collected.append(x)
        if new_states is not None:
            states.append(new_states)
    return StackOutput(x, collected, aux_loss, states)
