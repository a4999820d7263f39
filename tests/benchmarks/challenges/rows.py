"""Rows of measurements, kept in one file, and what tables say of several seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy import stats

from tests.benchmarks.machine import describe_machine

Row = dict[str, Any]
KEY = ("section", "case", "variant", "seed")
MACHINE = "machine"


@dataclass
class Rows:
    """What was measured, in a file of a JSON object a line; each is written as it is made."""

    path: Path
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path) -> Rows:
        """Return those of a file, none where there is no such file."""
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return cls(path, [json.loads(part) for part in text.splitlines()])

    def make(self, key: Sequence[Any], measure: Callable[[], Row]) -> None:
        """Measure what is not there yet."""
        named = dict(zip(KEY, key, strict=True))
        if any(all(row[k] == v for k, v in named.items()) for row in self.rows):
            return
        row = named | measure() | {MACHINE: describe_machine()}
        self.rows.append(row)
        print(json.dumps(row)[:200], flush=True)
        self.write()

    def write(self) -> None:
        """Write all of them."""
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        self.path.write_text(text, encoding="utf-8")

    def forget(self, sections: Iterable[str]) -> None:
        """Have the rows of ``sections`` measured anew."""
        names = set(sections)
        self.rows = [row for row in self.rows if row["section"] not in names]

    def of_section(self, section: str) -> list[Row]:
        """Return the rows of one section."""
        return [row for row in self.rows if row["section"] == section]


def ordered(rows: Iterable[Row], key: str) -> list[Any]:
    """Return the values of ``key``, each once, in the order in which they come."""
    return list(dict.fromkeys(row[key] for row in rows))


def values(rows: Iterable[Row], key: str, **where: Any) -> list[float]:
    """Return the numbers of ``key`` in the rows in which all of ``where`` holds; inf for none."""
    chosen = [row for row in rows if all(row[k] == v for k, v in where.items())]
    return [math.inf if row[key] is None else float(row[key]) for row in chosen]


def interval(found: Sequence[float], digits: int = 4) -> str:
    """Return the mean, and by Student's t the half width of its 95% interval."""
    if not found:
        return ""
    if any(math.isinf(x) for x in found):
        return "no number"
    mean = sum(found) / len(found)
    if len(found) == 1:
        return f"{mean:.{digits}f}"
    half = float(stats.sem(found) * stats.t.ppf(0.975, len(found) - 1))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return by how much ours is above theirs, seed by seed, as a share of their mean."""
    if len(ours) != len(theirs) or not ours or any(map(math.isinf, [*ours, *theirs])):
        return ""
    base = sum(theirs) / len(theirs)
    off = [(a - b) / base for a, b in zip(ours, theirs, strict=True)]
    mean = sum(off) / len(off)
    if len(off) == 1:
        return f"{mean:+.0%}"
    half = float(stats.sem(off) * stats.t.ppf(0.975, len(off) - 1))
    return f"{mean:+.0%} ± {half:.0%}"


def table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> list[str]:
    """Return a table of Markdown."""
    return [
        "| " + " | ".join(head) + " |",
        "| " + " | ".join(["---"] * len(head)) + " |",
        *("| " + " | ".join(map(str, row)) + " |" for row in body),
    ]
