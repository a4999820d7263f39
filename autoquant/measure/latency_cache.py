"""Times that were measured before on this machine, in one JSON file of the user's cache folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autoquant.user_cache import cache_folder, processor_name

FORMAT = 1
RUNS = ("kernels", "nn", "quant")
"""Packages whose code runs when a layer does; any change in them makes a new key."""


def cache_path() -> Path:
    """Return where the times are kept."""
    return cache_folder() / "latency.json"


def device_name(device: torch.device) -> str:
    """Return the name of the processor or the accelerator."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


@functools.cache
def runtime_version() -> str:
    """Return a digest of the code that runs in a layer."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for package in RUNS:
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(root).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def machine_key(device: torch.device) -> str:
    """Return what all times of this process depend on: device, torch, threads, and the code."""
    autocast = str(torch.get_autocast_dtype(device.type))
    settings = [torch.get_float32_matmul_precision(), torch.is_autocast_enabled(device.type)]
    parts = [device_name(device), torch.__version__, torch.get_num_threads(), runtime_version()]
    return json.dumps([*parts, *settings, autocast])


class LatencyCache:
    """Times by key, read once and written with what is new; never the reason of a failure."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_path()
        self._times = _read(self.path)
        self._new: dict[str, float] = {}

    def get(self, key: str) -> float | None:
        """Return the seconds of ``key``, None where they are not known."""
        return self._times.get(key)

    def put(self, key: str, seconds: float) -> None:
        """Keep the seconds of ``key``."""
        self._times[key] = self._new[key] = seconds

    def save(self) -> None:
        """Write what is new, beside what others wrote meanwhile."""
        if not self._new:
            return
        document = {"format": FORMAT, "seconds": _read(self.path) | self._new}
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self.path, json.dumps(document, indent=0, sort_keys=True))
            self._new = {}


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(path: Path) -> dict[str, float]:
    """Return the times in ``path``; none where it is missing, corrupt or of another format."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, Mapping) or found.get("format") != FORMAT:
        return {}
    seconds = found.get("seconds")
    if not isinstance(seconds, Mapping):
        return {}
    return {str(k): float(v) for k, v in seconds.items() if _is_time(v)}


def _is_time(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < float("inf")
