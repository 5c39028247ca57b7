"""A choice that is made by comparing real numbers, and that a second run of the same call is to make again.

Rounding can turn a comparison, and what was chosen may change how much is computed afterwards. Where a call is recorded
(`models/replay.py`), indices that torch itself chooses are kept without being asked for; whatever else is chosen goes
through here. So does what is chosen in many steps: the result alone is kept, not what each step found.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def chosen(
    compared: Tensor, choose: Callable[[Tensor], tuple[Tensor, ...]], *, below: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """What is chosen by these numbers; where a call is run again that of its first run, without choosing.

    Args:
        compared: the numbers.
        choose: gives the choices, int64 or bool, of any shapes; of `compared` alone, as for the second run.
        below: of each choice, what its entries are below, 2 for bool: they are kept in integers that hold them.

    Returns:
        `choose(compared)`, which must not be changed in place.
    """
    if has_torch_function_unary(compared):
        return handle_torch_function(chosen, (compared,), compared, choose, below=below)
    return choose(compared)
