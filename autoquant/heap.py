"""How a process keeps memory between layers: settings for programs of our own, not for a library.

glibc gives every block above some megabytes back to the system when it is freed, so each layer's
output is paged in, zeroed, once more. Kept blocks make elementwise operators on such outputs
several times faster; the process stays as large as it was at its largest.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Keep freed blocks for the next layer; return whether this C library can.

    It holds for the whole process, so a library does not call it of itself.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
