"""Recording what a call computes, so that it can be computed again at the cost of one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], list[Tensor]]
"""Computes on tensors that stay where they are, and returns the results."""


class CannotRecord(Exception):
    """Something in a call needs the host while it runs: it can only be called."""


class Recorded(Protocol):
    """One recorded call: the same kernels, on the same memory."""

    @property
    def outputs(self) -> list[Tensor]:
        """What the call returned; every replay writes there."""
        ...

    def replay(self) -> None:
        """Compute it again on what lies in its memory by now."""
        ...


class Recorder(Protocol):
    """A way to record calls on one device."""

    @property
    def device(self) -> torch.device:
        """Where what is recorded computes."""
        ...

    def record(self, work: Work) -> Recorded:
        """Record a call that was made before; CannotRecord where it needs the host."""
        ...
