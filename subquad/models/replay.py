"""A call that can be run again: what it drew, chose and changed is the same the second time.

A backward pass that recomputes a part of the forward pass has that part's input to rounding alone, and comes after
everything else has run. All that decides the result beside the input is therefore kept and given back:

    random numbers   the generators of the CPU and of the input's device start where they started
    buffers          a call that changes buffers (features drawn anew, running centroids) finds what it found
    choices          indices that torch computes from real numbers (argmax, topk, sort: buckets, experts) are those of
                     the first run, since rounding may turn a tie; so is what goes through `chosen` (kept keys, members)
    autocast         as it was, without its cache: a weight narrowed without a graph must not serve a run with one

Indices are kept in the narrowest integers that hold them, one byte each among at most 256 candidates, two among 32,768;
of a choice in many steps those alone that come out at the end. So memory grows with the number of calls by what can't
be computed again: 5,056 bytes of the CPU's generator, the buffers that a call changes, and its choices. These are, for
every query of a head: of `topk` top_k indices and whether there is a tie; of `routing` C w / L members and a label, for
queries and for keys, and causal a label alone; of `reformer` a bucket for each round.

A comparison of real numbers is made again, unless its result goes through `chosen`; what a call keeps outside of
buffers is its own affair, and its receipts are left once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import get_device_states, set_device_states

from subquad.models.call_buffers import CallBuffers
from subquad.ops.choice import chosen
from subquad.receipt import muted_receipts

_CHOOSING = ("argmax", "argmin", "argsort", "multinomial")
"""Functions that return indices."""
_DIMENSIONS = {"argmax": 1, "argmin": 1, "argsort": 1, "sort": 1, "max": 1, "min": 1, "topk": 2, "kthvalue": 2}
"""Where among the arguments of a function the dimension stands; those not named above return values and indices."""


def _of_torch(name: str) -> tuple[Callable[..., Any], ...]:
    return getattr(torch, name), getattr(Tensor, name)


_INDEX_FUNCTIONS = {function for name in _CHOOSING for function in _of_torch(name)}
_DIMENSION_PLACES = {function: place for name, place in _DIMENSIONS.items() for function in _of_torch(name)}


class Replay:
    """One call of some modules: recorded once, run again any number of times.

        replay = Replay(modules, x)
        with replay.record():
            y = modules(x)
        kept = replay.tensors()
        with replay.again(kept):
            y = modules(x_to_rounding)

    Args:
        modules: what the call runs, for their buffers.
        x: its input, for the device.
    """

    def __init__(self, modules: Sequence[nn.Module], x: Tensor) -> None:
        self._buffers = CallBuffers(modules)
        self._device_type = x.device.type
        self._devices, device_states = get_device_states(x)
        self._generators = [torch.get_rng_state(), *device_states]
        self._autocast = _autocast_now(self._device_type)
        self._choices: list[Tensor] = []

    @contextmanager
    def record(self) -> Iterator[None]:
        """Run the call for the first time inside this block."""
        with self._autocast(), self._buffers.record(), _Recording(self._choices):
            yield

    def tensors(self) -> list[Tensor]:
        """All tensors that are kept, for `save_for_backward`."""
        return [*self._generators, *self._buffers.found(), *self._choices]

    @contextmanager
    def again(self, kept: Sequence[Tensor]) -> Iterator[None]:
        """Run the call again inside this block, which leaves generators and buffers as they are.

        Args:
            kept: what `tensors` returned.
        """
        first, second = len(self._generators), len(self._generators) + len(self._buffers.found())
        generators, found, choices = kept[:first], kept[first:second], kept[second:]
        with (
            torch.random.fork_rng(self._devices, device_type=self._forked_type),
            self._buffers.again(found),
            self._autocast(),
            muted_receipts(),
            _Replaying(choices) as replaying,
        ):
            torch.set_rng_state(generators[0])
            set_device_states(self._devices, list(generators[1:]), device_type=self._device_type)
            yield
        replaying.check_complete()

    @property
    def _forked_type(self) -> str:
        return self._device_type if self._devices else "cuda"  # without devices none of the type is touched


def _autocast_now(device_type: str) -> Callable[[], AbstractContextManager[object]]:
    """A maker of blocks in which autocast is as it is now."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)


class _Recording(TorchFunctionMode):
    """Keeps every choice."""

    def __init__(self, choices: list[Tensor]) -> None:
        super().__init__()
        self._choices = choices

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is chosen:
            self._choices += [_narrowed(choice, below) for choice, below in zip(result, kwargs["below"], strict=True)]
            return result
        indices = _indices(func, result, args, kwargs)
        if indices is not None:
            self._choices.append(_narrowed(indices, _candidates(func, indices, args, kwargs)))
        return result


class _Replaying(TorchFunctionMode):
    """Gives every choice back."""

    def __init__(self, choices: Sequence[Tensor]) -> None:
        super().__init__()
        self._choices = choices
        self._given = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is chosen:
            return tuple(_widened(self._next(func)) for _ in kwargs["below"])
        result = func(*args, **kwargs)
        if _indices(func, result, args, kwargs) is None:
            return result
        indices = self._next(func).long()
        given = (indices,) if func in _INDEX_FUNCTIONS else (_taken(func, indices, args, kwargs), indices)
        if kwargs.get("out") is None:
            return indices if func in _INDEX_FUNCTIONS else type(result)(given)
        for out, right in zip((result,) if func in _INDEX_FUNCTIONS else result, given, strict=True):
            out.copy_(right)
        return result

    def check_complete(self) -> None:
        """Refuse a run that made fewer choices."""
        if self._given < len(self._choices):
            raise RuntimeError(f"the recompute makes {self._given} choices, the forward pass made {len(self._choices)}")

    def _next(self, func: Callable[..., Any]) -> Tensor:
        if self._given == len(self._choices):
            raise RuntimeError(f"the recompute chooses by {func.__name__} where the forward pass didn't")
        self._given += 1
        return self._choices[self._given - 1]


def _source(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["input"]


def _indices(func: Callable[..., Any], result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The indices that a function of torch has computed from real numbers; None where it does nothing of the kind."""
    if func in _INDEX_FUNCTIONS:
        indices = result
    elif func in _DIMENSION_PLACES and isinstance(result, tuple):  # the maximum of all, or of two, has no indices
        indices = result[1]
    else:
        return None
    return indices if _source(args, kwargs).is_floating_point() else None


def _dimension(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The dimension along which a function compares, the last where it isn't told."""
    place = _DIMENSION_PLACES.get(func, len(args))
    return args[place] if len(args) > place else kwargs.get("dim", -1)


def _taken(func: Callable[..., Any], indices: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The values at these indices."""
    source, dim = _source(args, kwargs), _dimension(func, args, kwargs)
    if indices.ndim == source.ndim:
        return source.gather(dim, indices)
    return source.gather(dim, indices.unsqueeze(dim)).squeeze(dim)


def _candidates(func: Callable[..., Any], indices: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Among how many numbers an index chooses, at most: a single index may be one into all."""
    source = _source(args, kwargs)
    return source.numel() if indices.numel() == 1 else source.shape[_dimension(func, args, kwargs)]


def _narrowed(choice: Tensor, below: int) -> Tensor:
    """The choice in the narrowest integers that hold all below this bound; bool as it is."""
    if choice.dtype == torch.bool:
        return choice
    fitting = (dtype for dtype in (torch.uint8, torch.int16, torch.int32) if below - 1 <= torch.iinfo(dtype).max)
    return choice.to(next(fitting, torch.int64))


def _widened(choice: Tensor) -> Tensor:
    """What has been narrowed, as it was."""
    return choice if choice.dtype == torch.bool else choice.long()
