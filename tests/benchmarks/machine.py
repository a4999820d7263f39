"""What a benchmark ran on, in one line for its report."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import numpy
import optuna
import torch

from autoquant.kernels.cpu.instructions import has_amx, has_vnni


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0].split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def integers_by() -> str:
    """Return what products of 8-bit integers are computed by here."""
    return "AMX" if has_amx() else "VNNI" if has_vnni() else "no VNNI"


def kind() -> str:
    """Return the kind of processor, as a part of a file's name: its maker, line and integers."""
    words = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", " ", f"{processor()} {integers_by()}")
    return "-".join(words.lower().split())


def gpu_kind() -> str:
    """Return the kind of the current GPU, as a part of a file's name."""
    return "-".join(re.sub(r"[^a-z0-9]+", " ", torch.cuda.get_device_name().lower()).split())


def describe_machine() -> str:
    """Return processor, cores and library versions."""
    versions = f"torch {torch.__version__}, Optuna {optuna.__version__}, NumPy {numpy.__version__}"
    caps = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
    capped = "".join(f", {name}={os.environ[name]}" for name in caps if os.environ.get(name))
    return (
        f"Measured on {processor()} ({integers_by()}{capped}), {os.cpu_count()} cores; {versions}."
    )


_OF = " Rows of: "


def machines(before: str, measured: Sequence[str], titles: Sequence[str]) -> str:
    """Return what the rows of a report were measured on, a line for each machine.

    ``before`` is the report as it was, with rows of ``titles``; those of ``measured`` are new.
    """
    rows: dict[str, list[str]] = {}
    for line in before.splitlines():
        if line.startswith("Measured on "):
            machine, _, known = line.partition(_OF)
            names = known.removesuffix(".").split("; ") if known else list(titles)
            rows[machine] = [name for name in names if name not in measured]
    rows.setdefault(describe_machine(), []).extend(measured)
    found = {machine: names for machine, names in rows.items() if names}
    if len(found) == 1:
        return next(iter(found))
    return "\n".join(f"{machine}{_OF}{'; '.join(names)}." for machine, names in found.items())
