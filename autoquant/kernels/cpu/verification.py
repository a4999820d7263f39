"""Which convolutions oneDNN computes rightly on this machine: each is tried before it is used.

oneDNN has some dozens of kernels for convolutions, chosen by shape, strides, threads and processor.
Some are wrong for some shapes. Those for AMX also write beyond their memory for some, which changes
no number at once, and ends the process later or never. So each geometry is compared with the
reference once, in a child process that may die, under an allocator (``guard.c``) that ends it where
anything is written beyond a block. The verdict is kept in the user's cache for this kind of
processor, this torch, these settings and this code. What comes out wrong, or kills the child, is
computed by the reference. Where the allocator is missing, nothing is taken that may use AMX:
without AMX no convolution that gave the right numbers was ever seen to write astray.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.machinery
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import IO

import torch

from autoquant.kernels.cpu.geometry import Geometry, may_be_tried
from autoquant.kernels.cpu.instructions import has_amx
from autoquant.user_cache import cache_folder, processor_digest

SECONDS = 120.0
"""How long one comparison may take; beyond it the child is ended and the convolution refused."""
RIGHT, WRONG, GUARDED = "right", "wrong", "guarded"
_KILLED = (-getattr(signal, "SIGKILL", 9), -getattr(signal, "SIGTERM", 15))
"""How a child ends that takes too long or too much memory: it may be otherwise next time."""
_PACKAGE = Path(__file__).parents[2]
_SETTINGS = ("ONEDNN_", "DNNL_", "ATEN_CPU_CAPABILITY")


def is_right(g: Geometry) -> bool:
    """Return whether oneDNN computes this convolution as the reference does."""
    if not may_be_tried(g):
        return False
    found = _known().get(line_of(g))
    return _verdicts().ask(g) if found is None else found


def line_of(g: Geometry) -> str:
    """Return a geometry as one line of JSON."""
    return json.dumps(asdict(g), separators=(",", ":"))


@functools.cache
def verdicts_path() -> Path:
    """Return the file of all verdicts that hold for this process."""
    digest = hashlib.sha256()
    digest.update(f"{processor_digest()} {torch.__version__}".encode())
    for name in sorted(n for n in os.environ if n.startswith(_SETTINGS)):
        digest.update(f"{name}={os.environ[name]}".encode())
    digest.update(f"{guard_path() is not None}".encode())
    for path in sorted(
        p for p in Path(__file__).parent.iterdir() if p.suffix in (".py", ".c", ".h")
    ):
        digest.update(path.read_bytes())
    return cache_folder() / f"convolutions-{digest.hexdigest()[:16]}.jsonl"


@functools.cache
def _known() -> dict[str, bool]:
    """Return what is known so far, by line; a line that is damaged is as if it weren't there."""
    found: dict[str, bool] = {}
    with contextlib.suppress(OSError):
        for line in verdicts_path().read_text(encoding="utf-8", errors="replace").splitlines():
            verdict, _, key = line.partition(" ")
            if verdict in (RIGHT, WRONG) and key.endswith("}"):
                found[key] = verdict == RIGHT
    return found


def _keep(key: str, right: bool, *, durable: bool) -> None:
    """Remember a verdict, for other processes too where it is ``durable``."""
    _known()[key] = right
    if durable:
        with contextlib.suppress(OSError):
            path = verdicts_path()
            path.parent.mkdir(parents=True, exist_ok=True)
            # One write at the end of the file: processes that write at once don't mix lines.
            with path.open("ab", buffering=0) as file:
                file.write(f"{RIGHT if right else WRONG} {key}\n".encode())


class _Verdicts:
    """Asks a child process, which is started when it is needed and lives on for the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._why_not: str | None = None

    def ask(self, g: Geometry) -> bool:
        """Return whether the child finds this convolution right, and remember it."""
        key = line_of(g)
        with self._lock:
            if key in _known():
                return _known()[key]
            answer = self._answer(key)
            status = self._reaped() if answer is None else None
            if status == 0:  # it had waited for so long that it ended as it was asked
                answer = self._answer(key)
                status = self._reaped() if answer is None else None
            died_of_it = status is not None and status not in (0, *_KILLED)
            durable = died_of_it or answer in (RIGHT, WRONG)
            _keep(key, answer == RIGHT, durable=durable)
            return _known()[key]

    def _answer(self, key: str) -> str | None:
        """Return what the child says; None where it died, or can't be had."""
        child = self._started()
        if child is None:
            return None
        assert child.stdin is not None
        assert child.stdout is not None
        timer = threading.Timer(SECONDS, child.kill)
        timer.start()
        try:
            child.stdin.write(key.encode() + b"\n")
            child.stdin.flush()
            return _line(child.stdout)
        except OSError:
            return None
        finally:
            timer.cancel()

    def _reaped(self) -> int | None:
        """Return the exit status of a child that gave no answer, None where there is none."""
        child, self._child = self._child, None
        if child is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=SECONDS)
        child.kill()
        return child.wait()

    def _started(self) -> subprocess.Popen[bytes] | None:
        """Return a child that has said it is ready; None, with a warning, where there is none."""
        if self._owner != os.getpid():  # the child belongs to the process that this one forked off
            self._owner, self._child = os.getpid(), None
        if self._child is not None and self._child.poll() is None:
            return self._child
        if self._why_not is None:
            try:
                self._child = _start()
                greeting = _line(self._child.stdout)
                if greeting == GUARDED or (greeting is not None and not has_amx()):
                    return self._child
                self._child.kill()
                status = self._child.wait()
                if greeting is None:
                    self._why_not = f"it ended with status {status}"
                else:
                    self._why_not = "nothing watches over its memory, as AMX needs: no C compiler"
            except (OSError, ValueError) as error:
                self._why_not = str(error)
            self._child = None
            warnings.warn(
                f"oneDNN's convolutions can't be tried in a child process ({self._why_not}): they "
                "are computed in float, which is slower",
                RuntimeWarning,
                stacklevel=2,
            )
        return None

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            child.wait()


@functools.cache
def _verdicts() -> _Verdicts:
    made = _Verdicts()
    atexit.register(made.close)
    return made


def _start() -> subprocess.Popen[bytes]:
    if not sys.executable:
        raise ValueError("no Python to run it with")
    before = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_PACKAGE), *([before] if before else [])]),
        "MALLOC_PERTURB_": "165",  # memory that was never written holds no zeros by luck
        "ONEDNN_VERBOSE": "0",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",  # all memory is freed, and looked at, at once
    }
    guard = guard_path()
    if guard is not None:
        environment["LD_PRELOAD"] = " ".join(
            [str(guard), *os.environ.get("LD_PRELOAD", "").split()]
        )
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "autoquant.kernels.cpu.trying"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # Ctrl-C is for the search; the child ends with its input
    )


def guard_path() -> Path | None:
    """Return the allocator of ``guard.c``, None where it was not built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_guard{suffix}")
        if sys.platform.startswith("linux") and path.exists():
            return path
    return None


def _line(stream: IO[bytes] | None) -> str | None:
    """Return the next line, None at the end."""
    assert stream is not None
    line = stream.readline()
    return line.decode().strip() if line.endswith(b"\n") else None
