"""Where what is true of this machine is kept between runs."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from pathlib import Path

_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags")
"""What a line of /proc/cpuinfo begins with that tells one kind of processor from another."""


def cache_folder() -> Path:
    """Return the user's folder for it; it may not exist yet.

    By the XDG standard a relative path in XDG_CACHE_HOME means nothing.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    root = folder if folder.is_absolute() else Path("~").expanduser() / ".cache"
    return root / "autoquant"


@functools.cache
def processor_name() -> str:
    """Return what the processor calls itself."""
    name = _cpuinfo().get("model name")
    return name or platform.processor() or platform.machine()


@functools.cache
def processor_digest() -> str:
    """Return what is the same for processors of one kind, and for no others."""
    found = _cpuinfo()
    parts = [platform.machine(), platform.processor(), *(found.get(f, "") for f in _FIELDS)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Return what the system says of the first processor; nothing where it says nothing."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}
