"""subquad: the efficient-Transformer mechanisms of the literature, implemented faithfully, proved, priced and chosen.

Names load lazily (PEP 562): `import subquad` is instant and doesn't import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "build_mixer": "subquad.build",
    "list_mixers": "subquad.build",
    "traits": "subquad.build",
    "cost": "subquad.build",
    "build_feedforward": "subquad.build",
    "list_feedforwards": "subquad.build",
    "Mixed": "subquad.interface",
    "Traits": "subquad.interface",
    "Dims": "subquad.interface",
    "MixerConfig": "subquad.interface",
    "FeedforwardConfig": "subquad.interface",
    "TokenMixer": "subquad.interface",
    "ChannelMixer": "subquad.interface",
    "HeadMixer": "subquad.layers.heads",
    "Mask": "subquad.mask",
    "State": "subquad.state",
    "state_dataclass": "subquad.state",
    "Cost": "subquad.costs",
    "Receipt": "subquad.receipt",
    "receipts": "subquad.receipt",
    "register": "subquad.registry",
}
_SUBPACKAGES = ("models", "ops", "patterns")

if TYPE_CHECKING:  # what the lazy names are, for editors and type checkers
    from subquad import models as models
    from subquad import ops as ops
    from subquad import patterns as patterns
    from subquad.build import build_feedforward as build_feedforward
    from subquad.build import build_mixer as build_mixer
    from subquad.build import cost as cost
    from subquad.build import list_feedforwards as list_feedforwards
    from subquad.build import list_mixers as list_mixers
    from subquad.build import traits as traits
    from subquad.costs import Cost as Cost
    from subquad.interface import ChannelMixer as ChannelMixer
    from subquad.interface import Dims as Dims
    from subquad.interface import FeedforwardConfig as FeedforwardConfig
    from subquad.interface import Mixed as Mixed
    from subquad.interface import MixerConfig as MixerConfig
    from subquad.interface import TokenMixer as TokenMixer
    from subquad.interface import Traits as Traits
    from subquad.layers.heads import HeadMixer as HeadMixer
    from subquad.mask import Mask as Mask
    from subquad.receipt import Receipt as Receipt
    from subquad.receipt import receipts as receipts
    from subquad.registry import register as register
    from subquad.state import State as State
    from subquad.state import state_dataclass as state_dataclass


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"subquad.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'subquad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_SUBPACKAGES})
