"""A choice that was made by comparing real numbers, which a second run of the same call is to make again.

Rounding can turn a comparison, and what was chosen may change how much is computed afterwards. Where a call is recorded
(`models/replay.py`), indices that torch itself chooses are kept without being asked for; whatever else is chosen goes
through here.
"""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def chosen(choice: Tensor) -> Tensor:
    """The choice, integers or bool, as it is; where a call is run again that of its first run, of whatever shape.

    It must not be changed in place.
    """
    return handle_torch_function(chosen, (choice,), choice) if has_torch_function_unary(choice) else choice
