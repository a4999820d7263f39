"""autoquant's row beside the best of all others', model by model and budget by budget."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from tests.benchmarks.peers.results import Row
from tests.benchmarks.peers.tables import fine

OURS = "autoquant"
NOT_PEERS = (OURS, "float", "naive", "one_shot", "measured")
"""Not tools that one would use instead: what all are held against, and parts of autoquant."""
HEAD = [
    "model",
    "at most bits",
    "divergence",
    "best peer's",
    "ratio",
    "points lost",
    "fewest lost by a peer",
    "by the naive recipe",
]
LOWER_IS_BETTER = ("token_error_rate", "word_error_rate", "perplexity", "mse", "mae")


def lost(row: Row, base: Row) -> float | None:
    """Return how many points of the metric a row loses against the float model's row."""
    if row.metric is None or base.metric is None:
        return None
    less = base.metric - row.metric
    return 100 * (-less if base.metric_name in LOWER_IS_BETTER else less)


def medians(rows: Sequence[Row], base: Row | None) -> tuple[float | None, float | None]:
    """Return the median divergence of a tool's runs, and of the points that they lose."""
    good = [r for r in rows if r.error is None]
    kl = [r.kl for r in good if r.kl is not None]
    points = [p for r in good if base is not None and (p := lost(r, base)) is not None]
    return (
        statistics.median(kl) if kl else None,
        statistics.median(points) if points else None,
    )


def cells(
    title: str, bits: float, rows: Mapping[str, Sequence[Row]], titles: Mapping[str, str]
) -> list[str] | None:
    """Return the line of one model and budget; None without a row of ours or of a peer.

    ``rows`` are the runs of each tool, ``titles`` the tools' names.
    """
    base = next((r for r in rows.get("float", ()) if r.error is None), None)
    found = {tool: medians(mine, base) for tool, mine in rows.items()}
    peers = {t: f for t, f in found.items() if t not in NOT_PEERS and f[0] is not None}
    ours = found.get(OURS, (None, None))
    if ours[0] is None or not peers:
        return None
    nearest = min(peers, key=lambda t: peers[t][0] or 0.0)
    least = peers[nearest][0]
    assert least is not None
    points = {t: f[1] for t, f in peers.items() if f[1] is not None}
    best = min(points, key=points.__getitem__, default=None)

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:+.2f}"

    return [
        title,
        f"{bits:g}",
        fine(ours[0]),
        f"{fine(least)} ({titles[nearest]})",
        f"{ours[0] / least:.2f}",
        shown(ours[1]),
        "–" if best is None else f"{shown(points[best])} ({titles[best]})",
        shown(found.get("naive", (None, None))[1]),
    ]
