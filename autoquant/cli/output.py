"""Standard output under --json: one object, and nothing else, whatever the task prints.

The user's code may print from Python, from C, and in processes that it starts. So once --json is
read, file descriptor 1 is standard error's, here and in every child, and what standard output was
is kept for the object alone. That isn't undone: what C holds in its buffers, and what is printed
when the process ends, comes later than the object does.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import click

STDOUT, STDERR = 1, 2
_KEPT = "autoquant.stdout"
"""Where a click context keeps the stream that the object goes to."""


def reserve(context: click.Context) -> None:
    """Keep standard output for ``emit``; all else that is printed goes to standard error."""
    if _KEPT in context.meta:
        return
    context.meta[_KEPT] = _taken(sys.stdout)
    if sys.stdout is not None:
        sys.stdout.flush()
    with contextlib.suppress(OSError):  # closed: nothing can come out there
        os.dup2(STDERR, STDOUT)
    sys.stdout = sys.stderr


def _taken(stdout: TextIO | None) -> TextIO | None:
    """Return a stream to where ``stdout`` goes, which nobody else knows."""
    try:
        if stdout is None or stdout.fileno() != STDOUT:
            return stdout
        return os.fdopen(os.dup(STDOUT), "w", encoding="utf-8")
    except OSError:  # not a file: somebody who runs the command line from Python reads along
        return stdout


def emit(found: Any) -> None:
    """Print ``found`` as one line of JSON, on what standard output was when the command began.

    JSON has no word for NaN and the infinities: they become null.
    """
    context = click.get_current_context(silent=True)
    out = None if context is None else context.meta.get(_KEPT)
    print(json.dumps(_finite(found), allow_nan=False), file=out or sys.stdout, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Give standard output back afterwards, to a program that runs a command itself."""
    stdout, saved = sys.stdout, None
    with contextlib.suppress(OSError):
        saved = os.dup(STDOUT)
    try:
        yield
    finally:
        sys.stdout = stdout
        if saved is not None:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).fflush(None)
            os.dup2(saved, STDOUT)
            os.close(saved)
