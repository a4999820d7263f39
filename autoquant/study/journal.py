"""A journal file that survives being killed at any byte.

Optuna's journal appends whole lines and syncs them to disk; three things are added. A last line
without an end is what a killed writer left: nobody was told that it was written, so it is cut off
before it can spoil the line after it. The lock belongs to the process, so that a killed one leaves
none behind. And a write that fails half-way, on a full disk, is taken back.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from autoquant.errors import StudyError

try:
    import fcntl
except ImportError:  # not a POSIX system: Optuna's own lock serves
    fcntl = None  # type: ignore[assignment]


START = b'{"op_code":'
"""How every line of Optuna's journal begins."""


class ProcessLock:
    """An exclusive lock beside the journal that the system releases when its holder ends.

    Whoever holds it may acquire it again, and gives it back as often.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(path.name + ".flock")
        self._handle: int | None = None
        self._depth = 0

    def acquire(self) -> bool:
        """Wait for the lock."""
        if self._handle is None:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._handle = handle
        self._depth += 1
        return True

    def release(self) -> None:
        """Give the lock back."""
        self._depth -= 1
        if self._handle is not None and not self._depth:
            os.close(self._handle)
            self._handle = None


class Journal(JournalFileBackend):
    """A journal backend on one file; see the module.

    Without ``write`` it is only read: no lock is made, nothing is cut off, and neither the file nor
    its folder needs to be writable. Raises StudyError where the file is no journal or is damaged
    before its last line.
    """

    def __init__(self, path: Path, *, write: bool = True) -> None:
        path = path.absolute()  # the code of a task may change the working directory
        self._path = path
        lock = ProcessLock(path) if fcntl is not None else None
        super().__init__(str(path), lock)  # type: ignore[arg-type]  # has both methods of a lock
        self._held = lock
        if write:
            with self.alone(), open(path, "r+b") as file:
                data = file.read()
                if (end := self._sound(data)) < len(data):
                    file.truncate(end)
        else:
            self._sound(path.read_bytes())

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Keep other processes from writing; false where this system has no such lock."""
        if self._held is None:
            yield False
            return
        self._held.acquire()
        try:
            yield True
        finally:
            self._held.release()

    def _sound(self, data: bytes) -> int:
        """Return how many bytes are whole lines; StudyError where one of them is none."""
        end = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:end].splitlines(), 1):
            try:
                sound = isinstance(json.loads(line), dict)
            except ValueError:
                sound = False
            if not sound:
                raise self._damaged(number)
        if end == 0 and not data[: len(START)] == START[: len(data)]:
            raise self._damaged(1)  # some other file: nothing of it is cut off
        return end

    def _damaged(self, number: int) -> StudyError:
        return StudyError(
            f"{self._path}: line {number} is damaged or this is no study journal; "
            "restore the file from a copy, or delete it and search again"
        )

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append ``logs``, all or none; OSError where they can't be written."""
        size = os.path.getsize(self._path)
        try:
            super().append_logs(logs)
        except OSError:
            with self.alone(), open(self._path, "r+b") as file:
                data = file.read()
                # Only what this write left: another worker may have added whole lines since.
                if not data.endswith(b"\n"):
                    file.truncate(max(data.rfind(b"\n") + 1, min(size, len(data))))
            raise
