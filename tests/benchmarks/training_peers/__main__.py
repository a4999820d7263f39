"""autoquant's training beside its peers': ``python -m tests.benchmarks.training_peers``.

Each run is a process of its own with one thread. Rows are kept in reports/training_peers.jsonl, so
an interrupted benchmark goes on; reports/training_peers.md has all that is known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tests.benchmarks.peers.cases import weights_of
from tests.benchmarks.peers.process import ROOT, call_worker
from tests.benchmarks.peers.results import Results
from tests.benchmarks.peers.tables import table
from tests.benchmarks.training_peers.cases import CASES, Case
from tests.benchmarks.training_peers.plan import known, plan
from tests.benchmarks.training_peers.rows import Row
from tests.benchmarks.training_peers.table import HEAD, SHORT_HEAD, lines, rates_line, short
from tests.benchmarks.training_peers.tools import BY_NAME, TOOLS

ROWS = ROOT / "reports" / "training_peers.jsonl"
LONGEST = 3600.0
"""Seconds that a run may take."""
INTRODUCTION = """\
# Training beside other tools

By `python -m tests.benchmarks.training_peers` (`pip install -c constraints.txt -e '.[test,bench]'`
and `pip install --no-deps -r tests/zoo/requirements.txt`). All start from the same float model and
bring every convolution and linear layer, first and last too, to the bits said: weights (W) with a
scale a channel and no zero point, activations (A) with a scale a tensor; biases and normalization
are float. All learn from the same unlabelled inputs, in the same batches and order for a seed, to
give what the float model gives: the loss is KL(float ‖ quantized) of the outputs. Rates rise for a
twentieth of the steps and fall by a cosine; ten times on the way the search split is looked at, and
what was best there is kept. Reported is the confirm split, by which nothing is chosen: peers by
their own fake-quantized module in evaluation mode, autoquant by its reference. Levels are the most
different numbers that any layer really multiplied, of a channel's weights and of its input: where
they are more than the bits allow, a run counts as an error.

Peers have AdamW without weight decay and one learning rate for all that they train, the best by the
search split with the first seed of those tried; looking for it isn't in their seconds. autoquant's
two rows have its default rates, and those that `reports/training.md` has for this model; its
seconds have opening the model, calibration and fitting layers to each other, peers' theirs without
opening. In the rows of the same time a peer has as many steps as fit into the seconds of autoquant
with the case's rates. Medians of seeds, in brackets the least and the most; the drop is that of the
median run. Seconds are those of the processor, on one thread; what else the machine does moves them
by a third and more. Rows that are missing here were not run yet; the command goes on with them.

- ModelOpt: `mtq.quantize`, weights by its `mse` algorithm, activations by a percentile of its
  histogram (99% at 2 bits, 99.9% above, by a first look at the search split); unsigned but in the
  first layer. Its quantizers' ranges stay as calibrated: it learns those of NVFP4 alone.
- Brevitas: `layerwise_quantize`, learned scales, of weights begun at the least squared error. Its
  symmetric weights are narrow: 2 bits have three levels.
- torchao pt2e: `prepare_qat_pt2e` with a quantizer of each layer; ranges observed while it trains,
  or learned (`LearnableFakeQuantize`). It fuses convolutions with normalization.
- torchao QATConfig takes linear layers alone, and activations a token; convolutions stay float."""


class Bench:
    """Measures runs one after the other, and keeps what they gave."""

    def __init__(self, results: Results, folder: Path) -> None:
        self._results, self._folder = results, folder
        self._tried: set[Any] = set()

    def have(self, wanted: Row) -> None:
        """See to it that a run is known; what fails is tried once."""
        if wanted.key in self._tried or known(self._results.rows(case=wanted.case), wanted):
            return
        self._tried.add(wanted.key)
        plain = wanted.plain()
        arguments = {n: plain[n] for n in ("case", "tool", "rate", "seed", "steps")}
        log = self._folder / f"{'-'.join(map(str, wanted.key))}.log"
        worker = "tests.benchmarks.training_peers.worker"
        found = call_worker(worker, arguments | {"folder": str(self._folder)}, log, 1, LONGEST)
        row = Row.read(plain | found)
        self._results.add(row)
        said = (
            row.error or f"held {row.held:.4f}, KL {row.kl:.4f}, {row.metric}, {row.seconds:.0f} s"
        )
        print(*row.key, said, flush=True)


def report(results: Results) -> str:
    """Return the report of all that is known."""
    measured = [(case, results.rows(case=case.name)) for case in CASES.values()]
    measured = [(case, rows) for case, rows in measured if rows]
    parts = [INTRODUCTION, "## In short\n\nDivergence and top-1, medians of seeds."]
    parts.append(table(SHORT_HEAD, [short(case.title, rows) for case, rows in measured]))
    for case, rows in measured:
        parts.append(f"## {case.title}: {case.steps} steps of {case.batch}")
        parts.append(table(HEAD, lines(rows)))
        tried = rates_line(rows)
        if tried:
            parts.append(f"Loss on the search split by learning rate: {tried}.")
    all_rows: list[Row] = [row for _, rows in measured for row in rows]
    packages = sorted({(BY_NAME[r.tool].package, r.version) for r in all_rows if r.version})
    versions = ", ".join(f"{name} {said}" for name, said in packages if name != "autoquant")
    codes = " and ".join(sorted({r.commit for r in all_rows if r.commit}))
    machines = "\n".join(sorted({r.machine for r in all_rows if r.machine}))
    parts.append(f"{machines}\n{versions}; autoquant at commit {codes}.")
    return "\n\n".join(parts) + "\n"


@click.command()
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="Only these.")
@click.option("--only", multiple=True, type=click.Choice(list(BY_NAME)), help="Only these tools.")
@click.option("--seeds", default=3, show_default=True, help="Runs of each.")
@click.option(
    "--cache",
    default=ROOT / ".autoquant" / "training_peers",
    type=click.Path(path_type=Path),
    help="Folder of logs, and of models that are trained first.",
)
@click.option(
    "--rows",
    default=ROWS,
    type=click.Path(path_type=Path),
    help="File of what was measured; the report is written beside it.",
)
@click.option("--anew", is_flag=True, help="Measure the tools of --only again, or all.")
def main(
    cases: tuple[str, ...],
    only: tuple[str, ...],
    seeds: int,
    cache: Path,
    rows: Path,
    anew: bool,
) -> None:
    """Measure what is not known yet and write the report; it goes on where it was ended.

    \b
    Example:
      python -m tests.benchmarks.training_peers --case resnext2 --only brevitas --anew
    """
    cache.mkdir(parents=True, exist_ok=True)
    results = Results(rows, Row)
    tools = [tool for tool in TOOLS if not only or tool.name in only]
    chosen: list[Case] = [case for case in CASES.values() if not cases or case.name in cases]
    if anew:
        names, titles = [case.name for case in chosen], [tool.name for tool in tools]
        results.forget([r for r in results.rows() if r.case in names and r.tool in titles])
    bench = Bench(results, cache)
    for model in dict.fromkeys(case.model for case in chosen):
        weights_of(model, cache)
    for count in range(1, seeds + 1):  # little time so gives a little of everything
        for case in chosen:
            for wanted in plan(case, tools, lambda name=case.name: results.rows(case=name), count):
                bench.have(wanted)
                rows.with_suffix(".md").write_text(report(results), encoding="utf-8")
    rows.with_suffix(".md").write_text(report(results), encoding="utf-8")


if __name__ == "__main__":
    main()
