"""A replayed call draws, chooses and finds what the first one did, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subquad import receipts
from subquad.models.replay import Replay
from subquad.ops.choice import chosen
from subquad.ops.topk import attention as topk
from subquad.receipt import leave_receipt

CHOICES: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda x: x.argmax(dim=-1),
    "argmax of all": lambda x: x.argmax(),
    "argmin": lambda x: torch.argmin(x, dim=1, keepdim=True),
    "argsort": lambda x: x.argsort(dim=1, descending=True),
    "multinomial": lambda x: torch.multinomial(x[0].abs() + 0.1, 3),
    "topk": lambda x: x.topk(2, dim=1),
    "topk by keyword": lambda x: torch.topk(input=x, k=2),
    "sort": lambda x: torch.sort(x, 1, True),
    "stable sort": lambda x: torch.sort(x, stable=True, dim=0),
    "max": lambda x: x.max(dim=-1),
    "max kept": lambda x: torch.max(x, 1, keepdim=True),
    "min": lambda x: torch.min(x, 0),
    "kthvalue": lambda x: x.kthvalue(2, dim=1),
    "out": lambda x: torch.topk(x, 2, out=(torch.empty(0, dtype=x.dtype), torch.empty(0, dtype=torch.int64))),
    "argmax out": lambda x: torch.argmax(x, dim=1, out=torch.empty(0, dtype=torch.int64)),
}


def values_and_indices(result: Any) -> tuple[Tensor | None, Tensor]:
    return (None, result) if isinstance(result, Tensor) else (result[0], result[1])


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
def test_choices_are_those_of_the_first_run(choose: Callable[[Tensor], Any]) -> None:
    x, other = torch.randn(2, 6, 5, 4).double()
    replay = Replay((), x)
    with replay.record():
        values, indices = values_and_indices(choose(x))
    with replay.again(replay.tensors()):
        values_again, indices_again = values_and_indices(choose(other))
    assert torch.equal(indices_again, indices)
    assert indices_again.dtype == torch.int64
    assert not torch.equal(values_and_indices(choose(other))[1], indices)
    with replay.again(replay.tensors()):
        same, _ = values_and_indices(choose(x))
    if values is not None and values_again is not None and same is not None:
        assert torch.equal(same, values)
        assert not torch.equal(values_again, values)


@pytest.mark.parametrize("choose", [lambda x: x.topk(2, dim=1), lambda x: x.max(dim=-1), lambda x: torch.sort(x, 1)])
def test_gradients_go_to_what_was_chosen_first(choose: Callable[[Tensor], Any]) -> None:
    x, other = torch.randn(2, 6, 5, 4).double()
    replay = Replay((), x)
    with replay.record():
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad((choose(leaf)[0] * 3).sum(), leaf)
    with replay.again(replay.tensors()):
        leaf = other.clone().requires_grad_()
        (found,) = torch.autograd.grad((choose(leaf)[0] * 3).sum(), leaf)
    assert torch.equal(found, expected)


def test_what_is_no_choice_is_computed_again() -> None:
    x, other = torch.randn(2, 6, 5)
    replay = Replay((), x)
    with replay.record():
        _ = x.max(), torch.max(x, other), (x > 0).int().argmax(dim=1), x.amax(dim=1)
    assert [tensor.dtype for tensor in replay.tensors()] == [torch.uint8]  # the generator alone
    with replay.again(replay.tensors()):
        assert torch.equal(other.max(), other.amax())


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, torch.uint8), (257, torch.int16), (32_768, torch.int16), (32_769, torch.int32)]
)
def test_indices_are_kept_narrow(size: int, dtype: torch.dtype) -> None:
    x = torch.arange(2.0 * size).view(2, size)
    replay = Replay((), x)
    with replay.record():
        last = x.argmax(dim=1)
    *_, kept = replay.tensors()
    assert kept.dtype == dtype
    assert torch.equal(kept.long(), last)


def test_another_number_of_choices_is_an_error() -> None:
    replay = Replay((), torch.ones(2))
    with replay.record():
        pass
    with pytest.raises(RuntimeError, match="the recompute chooses by argmax where"), replay.again(replay.tensors()):
        torch.ones(2).argmax()


def test_fewer_choices_are_an_error() -> None:
    replay = Replay((), torch.ones(2))
    with replay.record():
        torch.ones(2).argmax()
    with pytest.raises(RuntimeError, match="makes 0 choices, the forward pass made 1"), replay.again(replay.tensors()):
        pass


def test_only_the_dimension_that_is_chosen_along_counts() -> None:
    x = torch.randn(2, 300, 5)
    choices = [x.argmax, lambda dim: x.topk(2, dim=dim), lambda dim: x.sort(dim), lambda dim: torch.min(x, dim)]
    for dim, dtype in ((2, torch.uint8), (1, torch.int16)):
        replay = Replay((), x)
        with replay.record():
            for choose in choices:
                choose(dim)
        assert [kept.dtype for kept in replay.tensors()[1:]] == [dtype] * len(choices)


def places_of_the_maximum(x: Tensor) -> tuple[Tensor, Tensor]:
    return (x >= x.max(dim=0).values).nonzero()[:, 0], x > 1.5


def test_comparisons_are_those_of_the_first_run_where_they_are_declared_choices() -> None:
    x, replay = torch.tensor([1.0, 2.0, 2.0]), Replay((), torch.ones(2))
    with replay.record():
        first = chosen(x, places_of_the_maximum, below=(3, 2))
    x[2] -= 1
    with replay.again(replay.tensors()):
        again = chosen(x, places_of_the_maximum, below=(3, 2))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(again, first, strict=True))
    assert not torch.equal(chosen(x, places_of_the_maximum, below=(3, 2))[1], first[1])


def test_of_a_choice_in_many_steps_the_result_alone_is_kept() -> None:
    x, replay = torch.tensor([1.0, 2.0, 2.0]), Replay((), torch.ones(2))
    with replay.record():
        chosen(x, places_of_the_maximum, below=(3, 2))
    assert [kept.tolist() for kept in replay.tensors()[1:]] == [[1, 2], [False, True, True]]
    assert [kept.dtype for kept in replay.tensors()[1:]] == [torch.uint8, torch.bool]


@pytest.mark.parametrize(("length", "bytes_of_index"), [(256, 1), (257, 2)])
@pytest.mark.parametrize("top_k", [8, 32])
def test_top_scores_keep_one_narrow_index_each_and_whether_there_is_a_tie(
    top_k: int, length: int, bytes_of_index: int
) -> None:
    q, k, v = torch.randn(3, 2, 4, length, 8)
    replay = Replay((), q)
    with replay.record():
        topk.topk_attention(q, k, v, top_k=top_k)
    kept = sum(tensor.nbytes for tensor in replay.tensors()[1:])
    assert kept == 2 * 4 * length * (top_k * bytes_of_index + 1)


@pytest.mark.parametrize("noise", [1e-7, 1e-5])
def test_top_scores_keep_the_ties_of_the_first_run_in_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, noise: float
) -> None:
    monkeypatch.setattr(topk, "SLICE_PAIRS", 64)  # several parts, and several slices of queries apart
    q, k, v = torch.randn(3, 2, 4, 16, 8)
    for copy in range(6, 10):
        k[:, :, copy] = k[:, :, 5]
    replay = Replay((), q)
    with torch.no_grad(), replay.record():
        expected = topk.topk_attention(q, k, v, top_k=3)
    noisy = [(x + noise * torch.randn_like(x)).requires_grad_() for x in (q, k, v)]
    with replay.again(replay.tensors()):
        found = topk.topk_attention(*noisy, top_k=3)
    torch.testing.assert_close(found, expected, rtol=0, atol=100 * noise)
    exact = [x.clone().requires_grad_() for x in (q, k, v)]
    pairs = zip(
        torch.autograd.grad(found.sum(), noisy),
        torch.autograd.grad(topk.topk_attention_by_pairs(*exact, top_k=3).sum(), exact),
        strict=True,
    )
    for gradient, definition in pairs:
        torch.testing.assert_close(gradient, definition, rtol=0, atol=100 * noise + 1e-5)


def test_random_numbers_are_those_of_the_first_run_and_go_on_as_they_would() -> None:
    replay = Replay((), torch.ones(2))
    with replay.record():
        first = torch.rand(3)
    with replay.again(replay.tensors()):
        assert torch.equal(torch.rand(3), first)
        torch.rand(5)
    following = torch.rand(3)
    torch.manual_seed(0)
    torch.rand(3)
    assert torch.equal(torch.rand(3), following)


class Counting(nn.Module):
    """Replaces one buffer, changes another in place, and reads a third."""

    replaced: Tensor
    changed: Tensor
    read: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("replaced", "changed", "read"):
            self.register_buffer(name, torch.ones(2))

    def forward(self) -> Tensor:
        self.replaced = self.replaced + self.changed
        self.changed.add_(1)
        return self.replaced * self.changed * self.read


def test_buffers_are_as_the_first_run_found_them_and_stay_as_they_are() -> None:
    module = Counting()
    replay = Replay((module,), torch.ones(2))
    with replay.record():
        first = module()
    second = module()
    after = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for _ in range(2):
        with replay.again(replay.tensors()):
            assert torch.equal(module(), first)
    assert not torch.equal(second, first)
    assert len(replay.tensors()) == 1 + 2  # the third buffer is not kept
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, after[name])


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_is_as_it_was(enabled: bool) -> None:
    x = torch.randn(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        replay = Replay((), x)
        with replay.record():
            first = x @ x
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not enabled), replay.again(replay.tensors()):
        again = x @ x
    assert again.dtype == first.dtype == (torch.bfloat16 if enabled else torch.float32)


def test_a_weight_narrowed_without_a_graph_does_not_serve_a_later_call() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad(), Replay((layer,), x).record():
            layer(x)
        layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_receipts_are_those_of_the_first_run() -> None:
    replay = Replay((), torch.ones(2))
    with receipts() as collected:
        with replay.record():
            leave_receipt("here", asked="a", ran="b", reason="c")
        with replay.again(replay.tensors()):
            leave_receipt("here", asked="a", ran="b", reason="c")
        leave_receipt("there", asked="a", ran="b", reason="c")
    assert [(receipt.where, receipt.count) for receipt in collected.entries] == [("here", 1), ("there", 1)]
