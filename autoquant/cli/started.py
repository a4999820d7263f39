"""When the command began: what --timeout counts from."""

from __future__ import annotations

import os
import time
from pathlib import Path

LONGEST = 60.0
"""Seconds that the interpreter may take to begin; more is a clock that can't be trusted."""


def process_start() -> float:
    """Return when this process began, on the clock of ``time.monotonic``; now where unknown."""
    now = time.monotonic()
    try:
        # Field 22 of /proc/self/stat, counted behind the command's name, which may hold anything.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - age if 0 <= age <= LONGEST else now
