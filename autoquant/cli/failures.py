"""One line for everything that goes wrong, and the status that a command exits with.

| status | |
|---|---|
| 0 | done; where a maximum drop was asked for, it is proven to be kept (PASS) |
| 1 | a bug of autoquant's |
| 2 | a mistake that the user can mend |
| 3 | the maximum drop is proven not to be kept (FAIL) |
| 4 | whether the maximum drop is kept is not proven (NOT PROVEN) |
| 130 | interrupted |
| 141 | whoever read the output has gone |
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback

import click

from autoquant.errors import AutoquantError
from autoquant.spec.verdict import FAIL, NOT_PROVEN, PASS, Verdict

STATUSES = {PASS: 0, FAIL: 3, NOT_PROVEN: 4}
"""Outcome of a verdict → status."""


def verdict_status(verdict: Verdict | None) -> int:
    """Return the status of a command that judged a maximum drop; None where nobody asked for it."""
    return 0 if verdict is None else STATUSES[verdict.outcome]


class Interrupted(Exception):
    """A search was interrupted; says how to go on. (Click drops what a KeyboardInterrupt says.)"""


def report_failure(error: BaseException, *, debug: bool) -> int:
    """Print one line about ``error`` on standard error and return the exit status."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if debug:
        traceback.print_exception(error)
    if isinstance(error, click.ClickException):
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            error.show()
            return 2
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return _say(f"error: {error.format_message()}{hint}", 2)
    if isinstance(error, AutoquantError):
        return _say(f"error: {error}", 2)
    if isinstance(error, Interrupted | KeyboardInterrupt | click.Abort):
        return _say(f"interrupted{f': {error}' if str(error) else ''}", 130)
    # Click and rich exit by 1 where nobody reads on; the user's code can't (``usercode``).
    gone = isinstance(error, SystemExit) and error.code == 1
    if gone or isinstance(error, BrokenPipeError):
        _drop_output()
        return 141
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return _say(f"error: the disk is full: {error.filename or 'cannot write'}", 2)
    if isinstance(error, OSError) and error.filename is not None:
        return _say(f"error: {error.filename}: {error.strerror}", 2)
    kind = type(error).__name__
    again = "" if debug else "; run it again with --debug and report what it prints"
    return _say(f"internal error: {kind}: {error}{again}", 1)


def _drop_output() -> None:
    """Write what is still to be written nowhere: Python would fail to, as its last act."""
    if sys.stdout is None:
        return
    with contextlib.suppress(OSError, ValueError):  # no file of the system, or closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _say(line: str, status: int) -> int:
    if sys.stderr is not None:  # print would take standard output instead
        print(" ".join(line.split()), file=sys.stderr)
    return status
