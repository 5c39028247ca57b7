"""Whether a model can be shared out on a grid of processes; told before any process talks to another."""

from __future__ import annotations

from torch import nn

from subquad.interface import ChannelMixer, TokenMixer
from subquad.layers.expert_mixer import ExpertMixer
from subquad.models.block import Block
from subquad.parallel.grid import Grid


def blocks_of(model: nn.Module) -> list[Block]:
    """The layers of a model, in their order."""
    return [module for module in model.modules() if isinstance(module, Block)]


def check_model(model: nn.Module, grid: Grid) -> None:
    """Check that every layer can be shared out.

    Args:
        model: any model of subquad, whole; on the meta device too.
        grid: the processes.

    Raises:
        ValueError: naming what doesn't fit, the numbers, and what to do.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no layers of subquad.models, which are what is shared out")
    if getattr(getattr(model, "config", None), "residual", "standard") == "reversible":
        raise ValueError(
            "residual='reversible' can't be shared out: it calls the parts of a layer apart, and the layer is what "
            "gathers its parameters; use residual='standard' and gradient checkpointing"
        )
    _check_sharing(blocks)
    for block in blocks:
        for mixer in experts_of(block):
            _check_experts(mixer, grid)
        if grid.model > 1:
            for mixer in dense_mixers_of(block):
                _check_parting(mixer, grid.model)


def dense_mixers_of(block: Block) -> list[TokenMixer | ChannelMixer]:
    """What of a layer the processes of a row share by its `parting`: all mixers but those with experts."""
    mixers = (block.mixer, block.cross_mixer, block.feedforward)
    return [mixer for mixer in mixers if mixer is not None and not isinstance(mixer, ExpertMixer)]


def experts_of(block: Block) -> list[ExpertMixer]:
    """What of a layer has experts."""
    return [block.feedforward] if isinstance(block.feedforward, ExpertMixer) else []


def _check_sharing(blocks: list[Block]) -> None:
    """Every layer gathers its own parameters, so that none may belong to two."""
    first: dict[int, str] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            other = first.setdefault(id(parameter), f"layer {index}")
            if other != f"layer {index}":
                raise ValueError(
                    f"{block.mixer.config.name}: {name} is shared by {other} and layer {index}, which can't be shared "
                    "out among processes; choose the option by which each layer has its own"
                )


def _check_experts(mixer: ExpertMixer, grid: Grid) -> None:
    name, count, hidden = mixer.config.name, mixer.config.experts, mixer.experts.expand.shape[1]
    if count % grid.data:
        raise ValueError(
            f"{name}: {count} experts can't be shared out evenly among {grid.data} data-parallel processes (world size "
            f"{grid.processes}, {grid.model} to a row); the number of experts must be a multiple of {grid.data}"
        )
    if hidden % grid.model:
        raise ValueError(
            f"{name}: hidden_dim={hidden} can't be shared out evenly among the {grid.model} processes of a row; it "
            f"must be a multiple of {grid.model}"
        )


def _check_parting(mixer: TokenMixer | ChannelMixer, parts: int) -> None:
    name = mixer.config.name if isinstance(mixer, TokenMixer) else type(mixer).__name__.lower()
    if mixer.parting is None:
        raise ValueError(
            f"{name}: can't be shared out among the {parts} processes of a row, because it isn't known to be a sum of "
            "parts that are alike (its class has no `parting`); use rows of 1"
        )
    layers = (*mixer.parting.columns, *mixer.parting.rows)
    own = [found for found, _ in mixer.named_parameters() if found.rpartition(".")[0] not in layers]
    own += [found for found, _ in mixer.named_buffers()]
    if own:
        raise ValueError(
            f"{name}: can't be shared out among the {parts} processes of a row with these options, because of "
            f"{', '.join(own)} beside the projections; use rows of 1, or options without"
        )
    if isinstance(mixer, TokenMixer):
        size, what = mixer.dims.num_heads, "heads"
    else:
        size, what = mixer.get_parameter(f"{mixer.parting.columns[0]}.weight").shape[0], "hidden channels"
    if size % parts:
        raise ValueError(
            f"{name}: {size} {what} can't be shared out evenly among the {parts} processes of a row; their number must "
            f"be a multiple of {parts}"
        )
