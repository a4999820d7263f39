"""The verdict on "the metric drops at most this much", in one line for people."""

from __future__ import annotations

import math

from autoquant.models.direction import in_words
from autoquant.models.metrics import METRICS
from autoquant.report.tables import plain_number
from autoquant.spec.recipe import Evidence
from autoquant.spec.verdict import NOT_PROVEN, Verdict


def verdict_line(verdict: Verdict, metric: str) -> str:
    """Return what is proven of a drop, and where nothing is, what a proof would take.

    Numbers of a fraction such as accuracy are in points, of any other metric in its own unit.
    """
    points = metric in METRICS and METRICS.get(metric).bounded

    def number(value: float) -> str:
        return f"{100 * value:+.2f}" if points else f"{value:+.4g}"

    limit = f"{verdict.margin:.4g}"
    if points:
        count = f"{100 * verdict.margin:.4g}"
        limit = f"{count} point" if count == "1" else f"{count} points"
    said = f"drop {number(verdict.drop)}"
    if verdict.interval is not None:
        low, high = verdict.interval
        said += f", 95% interval {number(low)} … {number(high)}"
    parts = [said]
    if verdict.flip_rate is not None:
        parts.append(f"{verdict.flip_rate:.1%} of samples flip")
    if verdict.outcome == NOT_PROVEN:
        parts.append(_missing(verdict))
    return f"drop ≤ {limit}: {verdict.outcome} ({'; '.join(parts)})"


def _missing(verdict: Verdict) -> str:
    if verdict.samples_needed is not None:
        return (
            f"a proof would need about {_about(verdict.samples_needed):,} samples, there are "
            f"{verdict.samples:,}"
        )
    if verdict.interval is None:
        return "how sure that is can't be told from what was measured"
    return "it is not below the limit, so more samples would hardly prove it"


def _about(count: int) -> int:
    """Return ``count`` with two digits that count, rounded up."""
    step = 10 ** max(len(str(count)) - 2, 0)
    return math.ceil(count / step) * step


def reported_line(evidence: Evidence) -> str:
    """Return the reported metric, beside the one that the search went by."""
    found = evidence.reported
    if evidence.confirm is None:
        where = f"measured on the data that the search saw{_count(', {} samples', found.samples)}"
    else:
        seen = evidence.search
        where = (
            f"confirmed{_count(' on {} samples', found.samples)}; on the "
            f"{_count('{} ', seen.samples) or 'data '}searched by: quantized "
            f"{plain_number(seen.quantized)}, drop {plain_number(seen.drop)}"
        )
    return (
        f"{evidence.metric} ({in_words(evidence.higher_is_better)}): float "
        f"{plain_number(found.baseline)}, quantized {plain_number(found.quantized)}, "
        f"drop {plain_number(found.drop)} ({where})"
    )


def _count(text: str, samples: int) -> str:
    """Return ``text`` with the number of samples; nothing where only the task knows it."""
    return text.format(samples) if samples else ""
