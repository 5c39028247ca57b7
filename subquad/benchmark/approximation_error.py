"""How far mechanisms are from exact softmax attention, on given queries, keys and values.

    error = |y - y_softmax| / |y_softmax|        for every head, over all of its tokens

The mechanism runs behind projections that hand q, k and v through: x holds the three side by side, the projections
select them, and the one at the end returns the heads. What a mechanism adds to attention is left out, where its config
says that there is such a thing (`comparison`). Dense attention is the mechanism `full` behind the same projections. One
whose queries are its keys too doesn't read k, and is held against attention of its own kind to everything visible.
Averaging the values without looking at the queries is told beside it: a mechanism that is no closer than that
approximates nothing on these inputs. A mechanism that means to be something else (a window, another kernel) is measured
alike: the figure says what swapping it in would change.

Which option to turn is read off the price: a whole number that costs FLOPs when it is doubled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from subquad.build import build_from_config, make_dims, mixer_config
from subquad.config import make_config
from subquad.interface import Dims, MixerConfig, TokenMixer
from subquad.records.conventions import DENSE

LENGTHS = (256, 1024, 4096)
SCALES = (0.25, 0.5, 1.0)
"""Standard deviations of random queries and keys; scores then have their squares."""
_KEYS = "project_key"
_PROJECTIONS = ("project_query", _KEYS, "project_value", "project_out")


class Qkv(NamedTuple):
    """Queries, keys and values, float32 (B, H, L, E), and where they are from."""

    q: Tensor
    k: Tensor
    v: Tensor
    source: str

    def first(self, length: int) -> Qkv:
        """The first tokens."""
        q, k, v = (tensor[:, :, :length] for tensor in self[:3])
        return Qkv(q, k, v, self.source)


@dataclass(frozen=True)
class ErrorPoint:
    """The error of one config on one input.

    Attributes:
        options: option to value, of those that are compared.
        source: what the input is.
        length: its tokens.
        mean: over heads and examples; not finite where the mechanism's result isn't.
        worst: of the worst head.
        averaging: mean error of averaging all visible values.
        note: what has to be known of the figures, or nothing.
    """

    options: dict[str, int]
    source: str
    length: int
    mean: float
    worst: float
    averaging: float
    note: str = ""


def random_qkv(length: int, *, num_heads: int, head_dim: int, scale: float, examples: int = 1, seed: int = 0) -> Qkv:
    """Gaussian queries and keys of standard deviation `scale`, and standard normal values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, examples, num_heads, length, head_dim)
    q, k, v = torch.randn(shape, generator=generator)
    return Qkv(scale * q, scale * k, v, f"N(0, {scale:g}²)")


def read_qkv(path: Path) -> Qkv:
    """The tensors q, k and v of a safetensors file, each (B, H, L, E) or (H, L, E); others are not read.

    Raises:
        ValueError: another kind of file, a tensor that is missing, or shapes or numbers that can't be attended with.
        OSError: no such file.
    """
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):
        pass  # an error of the system's own, which names the file
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            missing = [name for name in "qkv" if name not in names]
            if missing:
                raise ValueError(
                    f"{path}: expected tensors q, k and v, but {', '.join(missing)} is missing; it holds "
                    f"{', '.join(sorted(names)) or 'none'}"
                )
            tensors = {name: file.get_tensor(name) for name in "qkv"}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error
    q, k, v = (_checked(path, name, tensor, tensors["q"]) for name, tensor in tensors.items())
    return Qkv(q, k, v, path.name)


def _checked(path: Path, name: str, tensor: Tensor, q: Tensor) -> Tensor:
    if tensor.ndim not in (3, 4) or not tensor.numel():
        raise ValueError(f"{path}: {name} must have shape (B, H, L, E) or (H, L, E), got {tuple(tensor.shape)}")
    if tensor.shape != q.shape:
        raise ValueError(f"{path}: q, k and v must have one shape, got {tuple(q.shape)} and {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{path}: {name} must be floating point, got {tensor.dtype}")
    wide = tensor.float()
    if not bool(wide.isfinite().all()):
        raise ValueError(f"{path}: {name} holds numbers that are not finite")
    return wide if wide.ndim == 4 else wide[None]


def knobs(config: MixerConfig, dims: Dims, length: int) -> dict[str, tuple[int, ...]]:
    """Options to turn: name to half, the same and twice the value, of whole numbers whose doubling costs FLOPs."""
    found = {}
    for name in (field.name for field in fields(config)):
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            continue
        tried = (each for each in (value // 2, value, 2 * value) if each)
        priced = {each: _flops(config, name, each, dims, length) for each in tried}
        here, twice = priced[value], priced[2 * value]
        if here is not None and twice is not None and twice > here:
            found[name] = tuple(each for each, flops in priced.items() if flops is not None)
    return found


def _flops(config: MixerConfig, name: str, value: int, dims: Dims, length: int) -> int | None:
    """FLOPs with another value of an option; None where it isn't allowed."""
    try:
        changed = replace(config, **{name: value})
        changed.check(dims)
        return changed.cost(dims, length, 4).flops
    except ValueError:
        return None


def approximation_errors(
    config: MixerConfig, inputs: Iterable[Qkv], *, sweeps: Mapping[str, Sequence[int]] | None = None, causal: bool
) -> list[ErrorPoint]:
    """The error on every input, for every value of the options to turn, one option at a time.

    Args:
        config: the mechanism with its options.
        inputs: what to attend with.
        sweeps: option to values; None for `knobs`, or for the config alone where there are none.
        causal: the form.

    Raises:
        ValueError: the mechanism is no attention or lacks this form, or a bad option or value.
    """
    points: list[ErrorPoint] = []
    for qkv in inputs:
        length, dims = qkv.q.shape[2], _dims_of(qkv, causal=causal)
        measured, own_exact, note = config.comparison(dims, length)
        exact_config = own_exact or mixer_config(DENSE)
        exact = _attend(exact_config, dims, qkv)
        averaging = _errors(_attend(exact_config, dims, qkv._replace(q=torch.zeros_like(qkv.q))), exact)
        turned = knobs(measured, dims, length) if sweeps is None else sweeps
        _check_measured(config, measured, turned)
        for options in _combinations(turned):
            changed = make_config(type(measured), config.name, _options_of(measured) | options)
            errors = _errors(_attend(changed, dims, qkv), exact)
            figures = float(errors.mean()), float(errors.max()), float(averaging.mean())
            points.append(ErrorPoint(options, qkv.source, length, *figures, note))
    return points


def _check_measured(config: MixerConfig, measured: MixerConfig, turned: Iterable[str]) -> None:
    """Refuse to turn what is left out of the measurement."""
    for name in turned:
        kept = getattr(measured, name)
        if kept != getattr(config, name):
            raise ValueError(
                f"{config.name}: {name} is no part of attention, and is left out where the error is measured "
                f"({name}={kept!r}); turn another option"
            )


def _combinations(sweeps: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    return [{name: value} for name, values in sweeps.items() for value in values] or [{}]


def _options_of(config: MixerConfig) -> dict[str, object]:
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _dims_of(qkv: Qkv, *, causal: bool) -> Dims:
    """The form, with a stream that has room for q, k and v side by side."""
    _, num_heads, length, head_dim = qkv.q.shape
    return make_dims(
        embed_dim=3 * num_heads * head_dim,
        num_heads=num_heads,
        head_dim=head_dim,
        causal=causal,
        max_length=length,
        bias=False,
    )


@torch.no_grad()
def _attend(config: MixerConfig, dims: Dims, qkv: Qkv) -> Tensor:
    """The heads (B, H, L, E) that the mechanism returns for q, k and v."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = build_from_config(config, dims).float().eval()
    _hand_through(mixer, reads_keys=config.comparison(dims, qkv.q.shape[2]).exact is None)
    x = torch.cat([tensor.transpose(1, 2).flatten(2) for tensor in qkv[:3]], dim=-1)
    y = mixer(x).y[..., : dims.inner_dim]
    return y.unflatten(-1, (dims.num_heads, dims.head_dim)).transpose(1, 2)


def _hand_through(mixer: TokenMixer, *, reads_keys: bool) -> None:
    """Set the projections so that they select q, k and v from x, and write the heads to the front of y.

    Args:
        mixer: its projections are changed.
        reads_keys: whether it has keys beside its queries.

    Raises:
        ValueError: a mechanism that owns the whole block, or with other projections.
    """
    if mixer.config.placement == "block":
        raise ValueError(f"{mixer.config.name}: its error can't be measured, since it is a whole block, not attention")
    selection = torch.eye(mixer.dims.embed_dim).split(mixer.dims.inner_dim)
    weights = (*selection, selection[0].mT)
    for name, weight in zip(_PROJECTIONS, weights, strict=True):
        if name == _KEYS and not reads_keys:
            continue
        projection = getattr(mixer, name, None)
        if not isinstance(projection, nn.Linear) or projection.weight.shape != weight.shape:
            raise ValueError(
                f"{mixer.config.name}: its error can't be measured, since it doesn't project into heads as dense "
                f"attention does ({name})"
            )
        projection.weight.copy_(weight)


def _errors(y: Tensor, exact: Tensor) -> Tensor:
    """Relative error of every head (B, H)."""
    return (y - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1).clamp_min(torch.finfo(exact.dtype).tiny)
