"""What data that no search saw say of every recipe: ``python -m tests.benchmarks.peers.hindsight``.

Of g2p's seven layers all mixtures of widths within a budget can be tried. Each is measured on the
data that searches go by, and scored on the test data, as no search can: so the least error rate
there is the best that any choice among them could have come to. Writes ``reports/hindsight.md``.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from scipy.stats import spearmanr

from tests.benchmarks.machine import describe_machine
from tests.benchmarks.peers import ours, tables
from tests.benchmarks.peers.cases import load_case
from tests.benchmarks.peers.score import score
from tests.benchmarks.zoo import TITLES

REPORT = Path(__file__).resolve().parents[3] / "reports" / "hindsight.md"
HEAD = [
    "bits of the layers",
    "average bits",
    "divergence, searched",
    "drop in points, searched",
    "divergence, test",
    "error rate, test",
]


def report(name: str, bits: float, rows: list[list[float]], widths: list[str], base: float) -> str:
    """Return the report of ``rows``: [mixtures, average bits and the four numbers]."""
    numbers = np.array(rows)
    order = np.argsort(numbers[:, 4], kind="stable")
    shown = [
        [
            widths[i],
            f"{numbers[i, 0]:.2f}",
            f"{numbers[i, 1]:.4f}",
            f"{100 * numbers[i, 2]:+.2f}",
            f"{numbers[i, 3]:.4f}",
            f"{numbers[i, 4]:.4f}",
        ]
        for i in order
    ]
    by_loss, by_drop = (float(spearmanr(numbers[:, k], numbers[:, 4])[0]) for k in (1, 2))
    return "\n\n".join(
        [
            f"# {TITLES[name]}: every mixture of widths, at most {bits:g} bits",
            "`python -m tests.benchmarks.peers.hindsight`: every mixture of 8, 6 and 4 bits in "
            "which no layer could be wider within the budget, each layer calibrated as the profile "
            "finds best. Searches see the first two numbers; the other two are of the test data, "
            "which no tool sees.",
            f"Float error rate on the test data {base:.4f}; the least of any mixture "
            f"{numbers[:, 4].min():.4f}, the median {np.median(numbers[:, 4]):.4f}. Rank "
            f"correlation with the error rate on the test data: of the divergence that is searched "
            f"by {by_loss:.2f}, of the drop on the same data {by_drop:.2f}.",
            tables.table(HEAD, shown),
            describe_machine(),
        ]
    )


@click.command()
@click.option("--bits", default=5.0, show_default=True, help="Budget of average weight bits.")
def main(bits: float) -> None:
    """Measure and score every mixture of g2p and write reports/hindsight.md."""
    folder = REPORT.parents[1] / ".autoquant" / "peers"
    case = load_case("g2p", folder)
    base = float(score(case, case.model, folder)["metric"])
    session = ours.opened(case)
    rows, widths = [], []
    for sites in list(ours.mixtures(session, bits)):
        found = session.measure(sites, "search")[0]
        scored = score(case, ours.finished(session, case, sites, 0.0, 0).model, folder)
        rows.append(
            [found.average_weight_bits, found.loss, found.drop, scored["kl"], scored["metric"]]
        )
        widths.append(" ".join(str(site.weight_bits) for site in sites.values()))
    text = report("g2p", bits, rows, widths, base)
    REPORT.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
