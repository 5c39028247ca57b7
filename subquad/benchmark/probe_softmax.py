"""Does a mechanism approximate softmax attention? A criterion that can be measured, for both answers.

The mechanism and dense attention get the same projections, and inputs at which softmax attention is about half as far
from uniform averaging as the average is from 0 (beyond that random features fail, and below it everything is an
average). The error is the distance between the two outputs in units of the distance between softmax attention and
uniform averaging over the same keys:

    error = |y - y_softmax| / |y_softmax - y_uniform|        approximates: error <= 0.5

Averaging uniformly scores 1. Windows, blocks and the like are small, so that none holds the whole sequence, and so are
memories where the trait is False; but a mechanism that says True is judged with the sizes of its approximation (rank,
features, landmarks) as asked, and no smaller than their defaults: they set the error, which the trait doesn't promise
to be small at any size.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from subquad.benchmark.probe_subject import Finding, Subject, call, miniature
from subquad.build import build_from_config, mixer_config
from subquad.interface import MixerConfig, TokenMixer
from subquad.records.conventions import DENSE

LIMIT = 0.5
INPUT_SCALE = 0.5
_APPROXIMATION_SIZES = ("rank", "features", "landmarks")


def approximates_softmax(subject: Subject) -> Finding:
    """The trait against the criterion above."""
    claimed = subject.config.traits.approximates_softmax
    config = _as_good_as_asked(subject) if claimed else miniature(subject.config, memories=True)
    judged = replace(subject, config=config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.seed)
        mixer = build_from_config(judged.config, judged.dims).double().eval()
        dense = build_from_config(mixer_config(DENSE), judged.dims).double().eval()
    own, shapes = mixer.state_dict(), {name: value.shape for name, value in dense.state_dict().items()}
    if any(name not in own or own[name].shape != shape for name, shape in shapes.items()):
        return Finding(not claimed, f"approximates_softmax={claimed}: no projections to share with dense attention")
    dense.load_state_dict({name: own[name] for name in dense.state_dict()})
    inputs = subject.inputs(batch=8).map(lambda tensor: INPUT_SCALE * tensor)
    y, softmax = call(mixer, inputs).y, call(dense, inputs).y
    uniform = call(_without_queries(dense), inputs).y
    error = float((y - softmax).norm() / (softmax - uniform).norm())
    sentence = f"error {error:.2f} of softmax's distance from averaging, limit {LIMIT}"
    return Finding((error <= LIMIT) == claimed, f"approximates_softmax={claimed}: {sentence}")


def _without_queries(dense: TokenMixer) -> TokenMixer:
    """Every score 0: uniform averaging over the visible keys."""
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.startswith("project_query"):
                parameter.zero_()
    return dense


def _as_good_as_asked(subject: Subject) -> MixerConfig:
    """The small config with the sizes of its approximation as asked or by default, whichever is larger."""
    defaults = {field.name: field.default for field in fields(subject.asked) if field.name in _APPROXIMATION_SIZES}
    asked = {name: getattr(subject.asked, name) for name in defaults}
    return replace(subject.config, **{name: max(asked[name], _size(default)) for name, default in defaults.items()})


def _size(default: object) -> int:
    return default if type(default) is int else 0
