"""autoquant's row beside the best of all others', model by model and budget by budget."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from tests.benchmarks.peers.results import Row
from tests.benchmarks.peers.tables import fine

OURS = "autoquant"
NOT_PEERS = (OURS, "float", "naive", "one_shot", "measured", "every_width")
"""Not tools that one would use instead: what all are held against, and parts of autoquant."""
TOOLS = ("modelopt_gradient", "modelopt_kl", "modelopt_int8", "nncf", "inc")
"""Tools with a quantizer of their own; the other peers search autoquant's space by its engine."""
HEAD = [
    "model",
    "at most bits",
    "divergence",
    "best other tool's",
    "best other search's in the same space",
    "points lost",
    "fewest lost by any other",
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

    def nearest(names: Sequence[str]) -> str:
        best = min(names, key=lambda t: peers[t][0] or 0.0, default=None)
        if best is None:
            return "–"
        least = peers[best][0] or 0.0
        assert ours[0] is not None
        return f"{fine(least)} ({titles[best]}): {ours[0] / least:.2f} of it"

    points = {t: f[1] for t, f in peers.items() if f[1] is not None}
    best = min(points, key=points.__getitem__, default=None)

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:+.2f}"

    return [
        title,
        f"{bits:g}",
        fine(ours[0]),
        nearest([t for t in peers if t in TOOLS]),
        nearest([t for t in peers if t not in TOOLS]),
        shown(ours[1]),
        "–" if best is None else f"{shown(points[best])} ({titles[best]})",
        shown(found.get("naive", (None, None))[1]),
    ]
