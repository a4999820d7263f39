"""One run in a process of its own, so that what one tool breaks or patches is no other's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def call_worker(
    module: str, arguments: dict[str, Any], log: Path, threads: int, most: float
) -> dict[str, Any]:
    """Return what ``python -m module ARGUMENTS.json RESULT.json`` wrote, or {"error": why not}.

    What it prints is in ``log``; ``most`` are the seconds that it may take.
    """
    with tempfile.TemporaryDirectory() as temporary:
        paths = [Path(temporary) / name for name in ("arguments.json", "result.json")]
        paths[0].write_text(json.dumps(arguments), encoding="utf-8")
        words = [sys.executable, "-m", module, *map(str, paths)]
        count = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        error = None
        with log.open("w", encoding="utf-8") as file:
            try:
                done = subprocess.run(
                    words, cwd=ROOT, env=os.environ | count, stdout=file, stderr=file, timeout=most
                )
                error = f"ended with {done.returncode}; see {log.name}" if done.returncode else None
            except subprocess.TimeoutExpired:
                error = f"took more than {most:.0f} s"
        if not paths[1].exists():
            return {"error": error or "no result"}
        found: dict[str, Any] = json.loads(paths[1].read_text(encoding="utf-8"))
        return found
