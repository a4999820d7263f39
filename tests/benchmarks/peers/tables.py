"""The tables of the report, from rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from tests.benchmarks.peers.results import Row

HEAD = [
    "tool",
    "weights (average bits)",
    "divergence ± standard error",
    "{metric}",
    "seconds",
    "evaluations",
    "seeds",
]


def line(cells: Sequence[str]) -> str:
    """Return one row of a table."""
    return "| " + " | ".join(cells) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def spread(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    """Return the median of ``values``, with least … most where there are several that differ."""
    known = sorted(v for v in values if v is not None)
    if not known:
        return "–"
    middle = show(statistics.median(known))
    ends = show(known[0]), show(known[-1])
    return middle if ends[0] == ends[1] else f"{middle} ({ends[0]} … {ends[1]})"


def fine(value: float) -> str:
    """Return a divergence with as many digits as a small one needs."""
    return f"{value:.4f}" if value >= 0.002 else f"{value:.5f}"


def divergence(rows: Sequence[Row]) -> str:
    """Return the divergence with its standard error; over seeds, that of the median run."""
    known = sorted((r for r in rows if r.kl is not None), key=lambda r: r.kl or 0.0)
    if not known:
        return "–"
    middle = known[(len(known) - 1) // 2]
    median = statistics.median(r.kl or 0.0 for r in known)
    error = middle.kl_error or 0.0
    text = f"{fine(median)} ± {error:.4f}" if median >= 0.002 else f"{median:.5f} ± {error:.5f}"
    ends = fine(known[0].kl or 0.0), fine(known[-1].kl or 0.0)
    return text if ends[0] == ends[1] else f"{text} ({ends[0]} … {ends[1]})"


def cells(title: str, rows: Sequence[Row]) -> list[str]:
    """Return the row of one tool."""
    good = [r for r in rows if r.error is None]
    if not good:
        why = next((r.error for r in rows if r.error), "not run")
        return [title, "–", f"{why}".replace("|", "/"), "–", "–", "–", "0"]
    return [
        title,
        spread([r.bits for r in good], lambda v: f"{v:.2f}"),
        divergence(good),
        spread([r.metric for r in good], lambda v: f"{v:.4f}"),
        spread([r.seconds for r in good], lambda v: f"{v:.0f}"),
        spread([r.evaluations for r in good], lambda v: f"{v:.0f}"),
        str(len(good)),
    ]


def reached(curve: Sequence[float], goal: float) -> int | None:
    """Return after how many evaluations the best so far is at most ``goal``; None for never."""
    for count, best in enumerate(curve, 1):
        if best <= goal:
            return count
    return None


def pairs(ours: Sequence[Row], theirs: Sequence[Row]) -> list[tuple[int | None, int]]:
    """Return, a seed that both have, our evaluations to their last best, and theirs to get there.

    Theirs is where they first had it, not where they ended.
    """
    mine = {r.seed: r.curve for r in ours if r.error is None and r.curve}
    found = []
    for row in theirs:
        if row.error is None and row.curve and row.seed in mine:
            goal = row.curve[-1]
            found.append((reached(mine[row.seed], goal), reached(row.curve, goal) or 0))
    return found


def speed_cells(title: str, ours: Sequence[Row], theirs: Sequence[Row]) -> list[str]:
    """Return the row of one rival sampler in the table of evaluations."""
    both = pairs(ours, theirs)
    if not both:
        return [title, "not run", "–", "–", "–", "0"]
    counts = [float("inf") if mine is None else mine for mine, _ in both]
    length = max(len(r.curve) for r in ours if r.curve)

    def show(value: float) -> str:
        return f"more than {length}" if value == float("inf") else f"{value:g}"

    ratio = statistics.median(t / m for (_, t), m in zip(both, counts, strict=True))
    return [
        title,
        spread([float(len(r.curve)) for r in theirs], lambda v: f"{v:g}"),
        spread([t for _, t in both], lambda v: f"{v:g}"),
        spread(counts, show),
        f"{ratio:.1f}×" if ratio else "–",
        str(len(both)),
    ]


def seconds_cells(title: str, theirs: Row, ours: Row) -> list[str]:
    """Return the row of one tool: its seconds and divergence, and those of our first answer."""
    told = [fine(row.kl) if row.kl is not None else "–" for row in (theirs, ours)]
    spent = [f"{row.seconds:.0f}" if row.seconds is not None else "–" for row in (theirs, ours)]
    as_good = theirs.kl is not None and ours.kl is not None and ours.kl <= theirs.kl
    share = (
        f"{ours.seconds / theirs.seconds:.2f}"
        if as_good and ours.seconds is not None and theirs.seconds
        else "not as good"
    )
    return [title, spent[0], told[0], spent[1], told[1], share]
