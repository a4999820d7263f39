"""Importing much at once, for programs of our own."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Import inside: what is loaded stays to the end, and garbage is not looked for in it.

    A search of a small model spends a tenth of its time looking through what torch and Optuna
    loaded, again and again.
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if on:
            gc.enable()
