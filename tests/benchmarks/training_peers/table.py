"""The tables of the report, from rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tests.benchmarks.peers.tables import divergence, fine, spread
from tests.benchmarks.training_peers.plan import best_rate, swept
from tests.benchmarks.training_peers.rows import STEPS, TIME, Row
from tests.benchmarks.training_peers.tools import TOOLS, Tool

HEAD = [
    "tool",
    "steps",
    "learning rate",
    "divergence ± standard error",
    "top-1",
    "drop in points (95%)",
    "CPU seconds",
    "ms a step",
    "levels: weights, activations",
    "seeds",
]
SHORT_HEAD = [
    "case",
    "autoquant, default rates",
    "autoquant, the case's rates",
    "best peer, same steps",
    "best peer, same time",
]


def of_tool(rows: Sequence[Row], tool: Tool, goal: str) -> list[Row]:
    """Return the runs of a tool that its line is made of: those with its best rate, by seed."""
    rate = best_rate(rows, tool.name)
    mine = [r for r in rows if r.tool == tool.name and r.goal == goal]
    if rate is not None:
        mine = [r for r in mine if r.rate == rate and r.error is None]
    return sorted(mine, key=lambda r: r.seed)


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """Return the lines of one case: of so many steps, and of so much time."""
    found = []
    for goal in (STEPS, TIME):
        for tool in TOOLS:
            mine = of_tool(rows, tool, goal)
            if mine:
                title = tool.title if goal == STEPS else f"{tool.title}, same time"
                found.append(cells(title, mine))
    return found


def cells(title: str, rows: Sequence[Row]) -> list[str]:
    """Return the line of one tool."""
    good = [r for r in rows if r.error is None]
    if not good:
        why = next((r.error for r in rows if r.error), "not run")
        return [title, "–", "–", why.replace("|", "/"), *["–"] * 5, "0"]
    middle = median(good)
    rate = f"{middle.rate:g}" if middle.rate else "–"
    steps = [r.step_seconds for r in good]
    return [
        title,
        spread([r.steps for r in good], lambda v: f"{v:.0f}"),
        rate,
        divergence(good),  # type: ignore[arg-type]
        spread([r.metric for r in good], lambda v: f"{v:.4f}"),
        drop(middle),
        spread([r.seconds for r in good], lambda v: f"{v:.0f}"),
        spread([None if s is None else 1000 * s for s in steps], lambda v: f"{v:.0f}"),
        f"{middle.weight_levels}, {middle.activation_levels}",
        str(len(good)),
    ]


def median(rows: Sequence[Row]) -> Row:
    """Return the run whose divergence is in the middle, the lower of two."""
    ordered = sorted(rows, key=lambda r: float("inf") if r.kl is None else r.kl)
    return ordered[(len(ordered) - 1) // 2]


def drop(row: Row) -> str:
    """Return what the metric lost against the float model, with the interval, in points."""
    parts = (row.float_metric, row.metric, row.drop_low, row.drop_high)
    if None in parts:
        return "–"
    before, after, low, high = (float(part or 0.0) for part in parts)
    return f"{100 * (before - after):+.2f} ({100 * low:+.2f} … {100 * high:+.2f})"


def rates_line(rows: Sequence[Row]) -> str:
    """Return what each rate that was tried lost on the search split."""
    parts = []
    for tool in TOOLS:
        held = swept(rows, tool.name) if tool.swept else {}
        tried = [f"{rate:g}: {held[rate]:.4f}" for rate in sorted(held) if held[rate] < 1e9]
        if tried:
            parts.append(f"{tool.title} {', '.join(tried)}")
    return "; ".join(parts)


def short(title: str, rows: Sequence[Row]) -> list[str]:
    """Return the line of a case in the summary: medians of divergence and top-1."""
    by_name = {tool.name: tool for tool in TOOLS}
    ours = [of_tool(rows, by_name[name], STEPS) for name in ("default", "case")]
    return [title, *map(said, ours), best_peer(rows, STEPS), best_peer(rows, TIME)]


def said(rows: Sequence[Row]) -> str:
    """Return the medians of a tool's runs."""
    known = [r for r in rows if r.kl is not None and r.metric is not None]
    if not known:
        return "–"
    kl = statistics.median(r.kl or 0.0 for r in known)
    metric = statistics.median(r.metric or 0.0 for r in known)
    return f"{fine(kl)}, top-1 {metric:.4f}"


def best_peer(rows: Sequence[Row], goal: str) -> str:
    """Return the peer whose median divergence is least, and that."""
    found = []
    for tool in TOOLS:
        known = [r.kl for r in of_tool(rows, tool, goal) if r.kl is not None]
        if tool.swept and known:
            found.append((statistics.median(known), tool))
    if not found:
        return "–"
    tool = min(found, key=lambda pair: pair[0])[1]
    return f"{said(of_tool(rows, tool, goal))} ({tool.title})"
