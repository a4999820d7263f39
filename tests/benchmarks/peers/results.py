"""Measured rows as JSON lines, so that an interrupted benchmark goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

Key = tuple[str, str, float, int, int]


@dataclass(frozen=True)
class Row:
    """What one run of one tool gave; ``error`` says why there is nothing."""

    tool: str
    model: str
    budget: float
    seed: int
    trials: int
    bits: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    metric: float | None = None
    metric_name: str = ""
    seconds: float | None = None
    evaluations: int | None = None
    proposals: int | None = None
    curve: tuple[float, ...] = ()
    version: str = ""
    commit: str = ""
    threads: int = 0
    error: str | None = None

    @property
    def key(self) -> Key:
        """What tells one run from another."""
        return self.tool, self.model, self.budget, self.seed, self.trials

    @classmethod
    def read(cls, plain: dict[str, Any]) -> Row:
        """Return the row that a line of the file holds."""
        known = {field.name for field in fields(cls)}
        row = {k: v for k, v in plain.items() if k in known}
        return cls(**row | {"curve": tuple(row.get("curve", ()))})

    def plain(self) -> dict[str, Any]:
        """Return what a line of the file keeps."""
        return asdict(self) | {"curve": [float(f"{value:.6g}") for value in self.curve]}


class Results:
    """The rows in one file; a later line replaces an earlier one of the same run.

    ``kind`` is the class of the rows: another benchmark's have other fields and another key.
    """

    def __init__(self, path: Path, kind: Any = Row) -> None:
        self.path = path
        self._rows: dict[Any, Any] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = kind.read(json.loads(line))
                except (json.JSONDecodeError, TypeError):
                    continue  # the line that was being written when the run was killed
                self._rows[row.key] = row

    def done(self, key: Any, commit: str | None = None) -> bool:
        """Return whether a run has a result, of that commit's code; failed ones are tried again."""
        row = self._rows.get(key)
        return row is not None and row.error is None and commit in (None, row.commit)

    def add(self, row: Any) -> None:
        """Keep a row, on disk too."""
        self._rows[row.key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            # A line of its own, even after one that was cut short.
            file.write("\n" * cut + json.dumps(row.plain(), ensure_ascii=False) + "\n")

    def forget(self, gone: Iterable[Any]) -> None:
        """Drop rows, from disk too, so that they are measured anew."""
        for row in gone:
            self._rows.pop(row.key, None)
        lines = [json.dumps(r.plain(), ensure_ascii=False) + "\n" for r in self._rows.values()]
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text("".join(lines), encoding="utf-8")
        part.replace(self.path)

    def rows(self, **match: Any) -> list[Any]:
        """Return the rows whose fields are as given, ordered by seed."""
        found: Iterable[Any] = self._rows.values()
        kept = [r for r in found if all(getattr(r, k) == v for k, v in match.items())]
        return sorted(kept, key=lambda r: r.seed)
