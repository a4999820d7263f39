"""The flag that kernels raise where integers can't stand for real numbers.

An integer can't be NaN, and a host that waits for no kernel can't look for one. So layers hand
integers on only while somebody collects doubts: kernels then store 1 where they meet NaN in an
activation, or where an output that they hand on may be NaN or infinite. Whoever collects looks at
the flag once, after the whole batch, and computes that batch again, unchained, where it is not 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

_flag: ContextVar[Tensor | None] = ContextVar("flag", default=None)
"""Of this thread: another one that computes at the same time has doubts of its own."""


@contextlib.contextmanager
def collecting(flag: Tensor) -> Iterator[None]:
    """Let layers hand integers on inside; their doubts go to ``flag``, int32 [1] on the device.

    It is the caller's to set to 0 before. A kernel never stores 0 to it.
    """
    before = _flag.set(flag)
    try:
        yield
    finally:
        _flag.reset(before)


def current_flag() -> Tensor | None:
    """Return the flag that is being collected, None where nobody collects."""
    return _flag.get()
