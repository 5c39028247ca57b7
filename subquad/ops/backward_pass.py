"""Whether a forward pass is run again inside a backward pass, as checkpointing and reversible layers do.

Such a pass must repeat what the first one chose, and must not count as another step of training. The question to torch
is private; this module alone asks it.
"""

from __future__ import annotations

import torch

_NO_BACKWARD = -1


def is_recomputing() -> bool:
    """Whether autograd is running a backward pass on this thread."""
    return torch._C._current_graph_task_id() != _NO_BACKWARD
