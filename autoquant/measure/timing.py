"""How long a call takes: the median of repetitions, as many as it needs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]
Clock = Callable[[Call], float]
"""Runs a call once and returns the seconds that it took."""

LEAST = 5
"""Fewest repetitions."""
MOST = 1000
"""Most repetitions."""
BUDGET = 0.05
"""Seconds after which a layer is measured well enough."""
ERROR = 0.02
"""Relative standard error of the median that is small enough."""
SLOW = 10
"""Budgets after which three repetitions do: a layer of a large model takes its time."""
WARM_UP = 3
"""Calls that are not counted; a slow call is warm after one."""


def clock_of(device: torch.device) -> Clock:
    """Return the clock of a device: CUDA events where there are some, else the wall clock."""
    return _cuda_clock if device.type == "cuda" else _wall_clock


def _wall_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_clock(call: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def median_seconds(
    call: Call, clock: Clock, *, least: int = LEAST, budget: float = BUDGET, error: float = ERROR
) -> float:
    """Return the median time of ``call`` in seconds.

    Repeated at least ``least`` times, until the median's relative standard error is at most
    ``error`` or ``budget`` seconds are spent; a slow call three times.
    """
    for _ in range(WARM_UP):
        if clock(call) > budget:
            break
    times: list[float] = []
    spent = 0.0
    while len(times) < MOST:
        times.append(clock(call))
        spent += times[-1]
        n = len(times)
        if (n >= least and spent >= budget) or (n >= 3 and spent >= SLOW * budget):
            break
        # Not after every call: for the fastest ones this takes longer than they do.
        if n >= least and (n - least) % 10 == 0 and relative_error(times) <= error:
            break
    return statistics.median(times)


def relative_error(times: list[float]) -> float:
    """Return the standard error of the median of ``times``, as a fraction of it.

    The spread is the median absolute deviation, which outliers do not move: 1.4826 makes it a
    standard deviation, 1.2533 that of a median (Huber 1981, Robust Statistics).
    """
    middle = statistics.median(times)
    if middle <= 0:
        return 0.0
    spread = 1.4826 * statistics.median(abs(t - middle) for t in times)
    return 1.2533 * spread / math.sqrt(len(times)) / middle
