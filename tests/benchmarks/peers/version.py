"""Which code and which package gave a row."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CODE = ("autoquant", "search_spaces", "tests")
"""What results depend on: reports and texts are no part of it."""


def commit() -> str:
    """Return the last commit that changed this code, "" where git can't tell."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout

    changed = git("status", "--porcelain", "--", *CODE).strip()
    last = git("log", "-1", "--format=%h", "--", *CODE).strip()
    return f"{last}-dirty" if last and changed else last


def package_version(package: str) -> str:
    """Return the version of an installed distribution, "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
