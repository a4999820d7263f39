"""What to say when the user's own code fails: one line with type, message, file and line."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST_MESSAGE = 300
"""Longer messages (tensors, whole tracebacks) are cut: the line must stay one line."""


def describe(error: BaseException, file: str | None = None) -> str:
    """Return ``error`` as one line: ``ValueError: message (task.py:12)``.

    The line cited is the innermost one that lies in ``file``; none is cited where there is none.
    """
    message = " ".join(str(error).split())
    if len(message) > LONGEST_MESSAGE:
        message = message[: LONGEST_MESSAGE - 1] + "…"
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    # A task file runs under its absolute path, however the user wrote it.
    known = () if file is None else (file, str(Path(file).resolve()))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in known:
            return f"{text} ({frame.filename}:{frame.lineno})"
    return text


def file_of(function: Callable[..., Any]) -> str | None:
    """Return the file that defines ``function``, or None for a builtin or a callable object."""
    code = getattr(function, "__code__", None)
    return None if code is None else code.co_filename
