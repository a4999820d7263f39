"""autoquant beside its peers: ``python -m tests.benchmarks.peers``.

The same model, calibration data, formats and test data for all; each run in a process of its own.
Rows are kept in reports/peers.jsonl, so an interrupted benchmark goes on; reports/peers.md has all
that is known.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from tests.benchmarks.machine import describe_machine
from tests.benchmarks.peers import summary, tables
from tests.benchmarks.peers.cases import NAMES
from tests.benchmarks.peers.results import Results, Row
from tests.benchmarks.peers.tools import BY_NAME, TOOLS, Tool
from tests.benchmarks.zoo import TITLES

ROOT = Path(__file__).resolve().parents[3]
REPORT = ROOT / "reports" / "peers.md"
ROWS = ROOT / "reports" / "peers.jsonl"
RIVALS = ("tpe", "nsga2", "gp", "random")
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
given as many evaluations of half the selection data, from the same uniform recipes on; a candidate
that is over the budget by arithmetic is not evaluated and does not count, up to 20 proposals for
each evaluation (random ones end there where few are within the budget). The samplers of Optuna are
told of such candidates as completed ones that break their constraint. A search that takes more than
`--limit` seconds ends with the evaluations that it has by then: GP was given 240 or 300 seconds,
and of MobileNetV2 at 6 bits each of Optuna's samplers 80. The other half chooses among the best
five. ModelOpt's AutoQuantize scores layers on the calibration data, with the float model's own
classes as labels, or, where outputs are other numbers, these with noise as large as they are
spread; it leaves embeddings in float. The two knapsacks and the greedy search run on autoquant's
engine with its calibrations; their one-layer divergences are of the search's half.

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


def run_one(tool: Tool, wanted: Row, folder: Path, limit: float) -> Row:
    """Return the row that one process gives."""
    with tempfile.TemporaryDirectory() as temporary:
        paths = [Path(temporary) / name for name in ("arguments.json", "result.json")]
        arguments: dict[str, Any] = {
            "tool": wanted.tool,
            "model": wanted.model,
            "budget": wanted.budget,
            "seed": wanted.seed,
            "trials": wanted.trials,
            "limit": limit,
            "folder": str(folder),
        }
        paths[0].write_text(json.dumps(arguments), encoding="utf-8")
        words = [sys.executable, "-m", "tests.benchmarks.peers.worker", *map(str, paths)]
        log = folder / f"{wanted.tool}-{wanted.model}-{wanted.budget:g}-{wanted.seed}.log"
        error = None
        with log.open("w", encoding="utf-8") as file:
            try:
                # A search ends by itself at the limit; then its result is confirmed and scored.
                done = subprocess.run(words, cwd=ROOT, stdout=file, stderr=file, timeout=2 * limit)
                error = f"ended with {done.returncode}; see {log.name}" if done.returncode else None
            except subprocess.TimeoutExpired:
                error = f"took more than {2 * limit:.0f} s"
        found = {"error": error or "no result"}
        if paths[1].exists():
            found = json.loads(paths[1].read_text(encoding="utf-8"))
    return Row.read(vars(wanted) | found)


def wanted_rows(
    tools: list[Tool], model: str, budgets: tuple[float, ...], seeds: int, trials: int
) -> list[Row]:
    """Return what is to be run, seed by seed, so that little time gives a little of everything."""
    rows = []
    for seed in range(seeds):
        for bits in budgets:
            for tool in tools:
                if tool.takes(bits, model) and (tool.stochastic or seed == 0):
                    count = trials if tool.stochastic else 0
                    rows.append(Row(tool.name, model, bits, seed, count))
    return rows


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
    versions = sorted({f"{BY_NAME[r.tool].package} {r.version}" for r in known if r.version})
    threads = " or ".join(str(n) for n in sorted({r.threads for r in known if r.threads}))
    each = f" Each run had {threads} thread(s)." if threads else ""
    parts.append(
        f"{describe_machine()} {', '.join(versions)}.{each} The machine was shared with other work."
    )
    return "\n\n".join(parts) + "\n"


@click.command()
@click.option(
    "--model", "models", multiple=True, type=click.Choice(NAMES), help="Several are fine."
)
@click.option("--bits", "budgets", multiple=True, type=float, help="Budgets; several are fine.")
@click.option("--only", multiple=True, type=click.Choice(list(BY_NAME)), help="Only these tools.")
@click.option("--seeds", default=5, show_default=True, help="Runs of what is stochastic.")
@click.option("--trials", default=40, show_default=True, help="Evaluations of each search.")
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
    help="File of what was measured; by default the one behind the report.",
)
@click.option("--fresh", is_flag=True, help="Forget what is asked for, and measure it anew.")
@click.option(
    "--limit", default=3600.0, show_default=True, help="Seconds after which a search ends."
)
def main(
    models: tuple[str, ...],
    budgets: tuple[float, ...],
    only: tuple[str, ...],
    seeds: int,
    trials: int,
    cache: Path,
    rows: Path,
    fresh: bool,
    limit: float,
) -> None:
    """Measure what is not known yet and write reports/peers.md."""
    cache.mkdir(parents=True, exist_ok=True)
    results = Results(rows)
    tools = [tool for tool in TOOLS if not only or tool.name in only]
    wanted = [
        row
        for model in models or ("mobilenet_v2",)
        for row in wanted_rows(tools, model, budgets or (5.0, 6.0, 8.0), seeds, trials)
    ]
    if fresh:
        results.forget(row.key for row in wanted)
        for model in {row.model for row in wanted if row.tool in ("greedy", "measured")}:
            (cache / f"layers-{model}.json").unlink(missing_ok=True)
    for row in wanted:
        if results.done(row.key):
            continue
        began = time.monotonic()
        found = run_one(BY_NAME[row.tool], row, cache, limit)
        results.add(found)
        REPORT.write_text(report(results), encoding="utf-8")
        said = found.error or (
            f"{found.bits:.3f} bits, KL {found.kl}, {found.metric}, {found.seconds:.0f} s"
        )
        print(
            f"{row.model} {row.budget:g} {row.tool} seed {row.seed}: {said} "
            f"({time.monotonic() - began:.0f} s in all)",
            flush=True,
        )
    REPORT.write_text(report(results), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
