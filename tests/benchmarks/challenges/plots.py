"""Plots as SVG, the same bytes for the same numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def chart(path: Path, x: str, y: str) -> Iterator[Any]:
    """Yield axes, and write the chart as it is at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "autoquant", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(5.5, 3.4), layout="constrained")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
        yield axes
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
