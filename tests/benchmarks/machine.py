"""What a benchmark ran on, in one line for its report."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy
import optuna
import torch


def describe_machine() -> str:
    """Return processor, cores and library versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    versions = f"torch {torch.__version__}, Optuna {optuna.__version__}, NumPy {numpy.__version__}"
    return f"Measured on {cpu}, {os.cpu_count()} cores; {versions}."
