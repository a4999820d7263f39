"""Running the user's own code: whatever it raises is its failure, said in one line.

Not ``Exception`` alone: ``SystemExit``, ``GeneratorExit``, a ``KeyboardInterrupt`` that the code
raises itself and every other ``BaseException`` would else end a search in silence, or with the
status of success. What does end one is a signal, wherever it meets the program: inside
``interruptible`` Ctrl-C raises ``Interrupt``, which no ``guarded`` takes for the user's, and which
is raised again where the user's code caught it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from autoquant.errors import AutoquantError

LONGEST_MESSAGE = 300
"""Longer messages (tensors, whole tracebacks) are cut: the line must stay one line."""
NOBODYS = (signal.SIG_DFL, signal.default_int_handler)
"""Handlers of a signal that nobody has claimed."""


class Interrupt(KeyboardInterrupt):
    """A signal that ends the program: Ctrl-C, or what stands for it."""


class _Signals:
    """Takes signals. ``received`` says that one came: the code that it met may have caught it."""

    received = False

    def take(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        raise Interrupt


_SIGNALS = _Signals()


@contextlib.contextmanager
def interruptible(*numbers: signal.Signals) -> Iterator[None]:
    """Let signals (default: Ctrl-C's) raise Interrupt inside.

    Handlers that somebody else has set stay, and outside the main thread all do: there a
    KeyboardInterrupt can't be told from one that user code raises, and passes through it.
    """
    mine = []
    if threading.current_thread() is threading.main_thread():
        mine = [n for n in numbers or (signal.SIGINT,) if signal.getsignal(n) in NOBODYS]
    _SIGNALS.received = _SIGNALS.received and not mine
    before = {number: signal.signal(number, _SIGNALS.take) for number in mine}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class guarded:
    """Run code of the user's inside; what it raises becomes ``failed`` of a line that describes it.

    Errors of our own (a layer that can't take its input), of ``passing`` and interrupts pass.
    ``file`` is the file whose line is cited.
    """

    def __init__(
        self,
        failed: Callable[[str], Exception],
        file: str | None = None,
        passing: tuple[type[BaseException], ...] = (),
    ) -> None:
        self._failed = failed
        self._file = file
        self._passing: tuple[type[BaseException], ...] = (AutoquantError, Interrupt, *passing)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if _SIGNALS.received and not isinstance(error, Interrupt):
            _SIGNALS.received = False
            raise Interrupt from error
        if error is None or isinstance(error, self._passing):
            return
        # Where the signal is ignored, as in a background job of a shell, none can be meant.
        told_apart = signal.getsignal(signal.SIGINT) in (_SIGNALS.take, signal.SIG_IGN)
        if isinstance(error, KeyboardInterrupt) and not told_apart:
            return
        raise self._failed(describe(error, self._file)) from error


def describe(error: BaseException, file: str | None = None) -> str:
    """Return ``error`` as one line: ``ValueError: message (task.py:12)``.

    The line cited is the innermost one that lies in ``file``; none is cited where there is none.
    """
    message = _message(error)
    if len(message) > LONGEST_MESSAGE:
        message = message[: LONGEST_MESSAGE - 1] + "…"
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    # A task file runs under its absolute path, however the user wrote it.
    known = () if file is None else (file, str(Path(file).resolve()))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in known:
            return f"{text} ({frame.filename}:{frame.lineno})"
    return text


def _message(error: BaseException) -> str:
    """Return what an error says of itself; nothing where its own code fails at that."""
    try:
        return " ".join(str(error).split())
    except Exception:
        return ""


def file_of(function: Callable[..., Any]) -> str | None:
    """Return the file that defines ``function``, or None for a builtin or a callable object."""
    code = getattr(function, "__code__", None)
    return None if code is None else code.co_filename
