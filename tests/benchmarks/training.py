"""What training adds: ``python -m tests.benchmarks.training``.

For each case all weights of a model of the zoo have the same few bits, first and last layer too
(embeddings as said), and so have activations. Layers are fitted to each other first
(``autoquant tune``). From there one block after another is trained (``--method block``) and, beside
that, all layers together (``--method full``), on the unlabelled data that the task gives. Nothing
is chosen by what is reported: loss (how far outputs are from the float model's) and metric are of
the confirm split, by the reference. MobileNetV2 has 512 photos in all, of which 96 are held back to
choose by. Each seed draws other batches. Writes ``reports/training.md``; where
cases are named, it replaces their rows there.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch

from autoquant.heap import keep_freed_memory
from autoquant.methods.reconstruction.blockwise import Blockwise
from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.methods.reconstruction.sequential import Sequential
from autoquant.models.data import Splits
from autoquant.models.noninferiority import drop_interval
from autoquant.session.session import Session, open_session
from autoquant.session.training import train_blocks, train_layers
from autoquant.session.tuning import fit_layers
from autoquant.spec.recipe import SiteRecipe
from autoquant.spec.space import SearchSpace
from autoquant.spec.uniform import uniform
from autoquant.study.source import Source
from tests.benchmarks.evaluation import line
from tests.benchmarks.machine import machines
from tests.benchmarks.techniques import SPACE, opened
from tests.benchmarks.zoo import TITLES
from tests.zoo.conftest import HERE, task_module

HEAD = [
    "case", "recipe", "seed", "loss", "metric", "drop in points (95%)",
    "weights that became 0", "CPU seconds",
]  # fmt: skip
REPORT = Path(__file__).resolve().parents[2] / "reports" / "training.md"
RULE = "\n## "
"""What sections of the report begin with."""
PHOTOS, HELD = 416, 96
BLOCK, FULL, ALL = "blocks", "trained", "all"
KINDS = (BLOCK, FULL)
"""What rows of each kind of training are called."""
ORDER = ("fitted", *KINDS)


@dataclass(frozen=True)
class Case:
    """One model at some bits, and how it is trained."""

    title: str
    model: str
    weights: int
    activations: int
    technique: Distillation
    blocks: Blockwise = Blockwise()  # noqa: RUF009 - frozen
    embeddings: int | None = None
    granularity: str = "per_channel"
    scheme: str = "symmetric"


HIGH = Distillation(
    steps=1000, batch=32, weight_rate=0.01, scale_rate=2e-3, bias_rate=5e-3, activation_rate=2e-3
)
LOW = Distillation(
    steps=400, weight_rate=3e-4, scale_rate=3e-5, bias_rate=1e-4, activation_rate=3e-5
)
MIDDLE = Distillation(
    steps=200,
    weight_rate=1e-3,
    scale_rate=2e-4,
    bias_rate=5e-4,
    activation_rate=2e-4,
    features=1.0,
)
BLOCKS = Blockwise()
HIGH_BLOCKS = Blockwise(
    steps=400, weight_rate=0.01, scale_rate=3e-3, bias_rate=3e-3, activation_rate=3e-3
)
CASES = {
    "mobilenet_v2": Case("MobileNetV2, W4 A8, 512 photos", "mobilenet_v2", 4, 8, LOW, BLOCKS),
    "mobilenet_v2_3": Case("MobileNetV2, W3 A8, 512 photos", "mobilenet_v2", 3, 8, LOW, BLOCKS),
    "minilm": Case(f"{TITLES['minilm']}, W2 A8", "minilm", 2, 8, MIDDLE, BLOCKS, 4),
    "g2p3": Case(f"{TITLES['g2p']}, W3 A8", "g2p", 3, 8, replace(HIGH, batch=64), HIGH_BLOCKS),
    "g2p2": Case(
        f"{TITLES['g2p']}, W2 A8", "g2p", 2, 8, replace(HIGH, steps=3000, batch=64), HIGH_BLOCKS
    ),
    "g2p3g": Case(
        f"{TITLES['g2p']}, W3 in groups, A8",
        "g2p",
        3,
        8,
        replace(HIGH, batch=64),
        HIGH_BLOCKS,
        granularity="per_group_32",
        scheme="asymmetric",
    ),
    "g2p2g": Case(
        f"{TITLES['g2p']}, W2 in groups, A8",
        "g2p",
        2,
        8,
        replace(HIGH, steps=3000, batch=64),
        HIGH_BLOCKS,
        granularity="per_group_32",
        scheme="asymmetric",
    ),
    "resnext": Case(
        f"{TITLES['resnext']}, W2 A2", "resnext", 2, 2, replace(HIGH, steps=2000), HIGH_BLOCKS
    ),
}


def session_of(case: Case, folder: Path) -> Session:
    """Return the session of a case's model."""
    if case.model != "mobilenet_v2":
        return opened(case.model, folder)
    module = task_module(case.model)
    source = Source(str(module.weights()), str(HERE / f"{case.model}.py"))
    task = source.load_task()
    splits = Splits(
        calibrate=tuple(x for x, _ in module.batches(0, PHOTOS)),
        search=tuple(module.batches(PHOTOS, PHOTOS + HELD)),
        confirm=tuple(module.batches(-module.TEST, None)),
        samples={"calibrate": PHOTOS, "search": HELD, "confirm": module.TEST},
        notes=(),
    )
    return open_session(source.load(task), task, torch.device("cpu"), splits=splits)


def recipe_of(case: Case, session: Session) -> Mapping[str, SiteRecipe]:
    """Return the uniform recipe of a case."""
    text = SPACE.replace("GRANULARITY", case.granularity).replace("SCHEME", case.scheme)
    text = text.replace("activation_bits: [8]", f"activation_bits: [{case.activations}]")
    spaces = SearchSpace.parse(text, "training").resolve(session.prepared.sites)
    sites = dict(uniform(spaces, case.weights))
    if case.embeddings is not None:
        for site in session.prepared.sites:
            weight = sites[site.name].weight
            if site.kind == "embedding" and weight is not None:
                wide = replace(weight, bits=case.embeddings)
                sites[site.name] = replace(sites[site.name], weight=wide)
    return sites


def rows_of(case: Case, folder: Path, seeds: int, only: str) -> list[list[str]]:
    """Return the rows of one case, or those with ``only`` one kind of training."""
    session = session_of(case, folder)
    session.reuse()
    began = time.process_time()
    start = fit_layers(session, recipe_of(case, session), Sequential())
    session.evaluator.reuse = None
    rows = [row_of(session, case, "fitted", "", start, time.process_time() - began, "")]
    for what, seed in itertools.product(KINDS if only == ALL else (only,), range(seeds)):
        began = time.process_time()
        if what == BLOCK:
            found = train_blocks(session, start, case.blocks, fit=Sequential(), seed=seed)
        else:
            found = train_layers(session, start, case.technique, seed=seed)
        seconds = time.process_time() - began
        lost = f"{found.lost[0]:.1%} → {found.lost[1]:.1%}"
        rows.append(row_of(session, case, what, str(seed), found.sites, seconds, lost))
        for finding in found.findings:
            print("  ", finding, flush=True)
    return rows


def row_of(
    session: Session,
    case: Case,
    what: str,
    seed: str,
    sites: Mapping[str, SiteRecipe],
    seconds: float,
    lost: str,
) -> list[str]:
    """Return what one recipe gives on the confirm split."""
    base = session.baseline("confirm")
    with session.prepared.engine.reference(), session.without_reuse():
        measured, reading, _ = session.measure(sites, "confirm")
    assert base.evidence is not None
    assert reading.evidence is not None
    sure = drop_interval(base.evidence, reading.evidence, base.metric)
    row = [
        case.title,
        what,
        seed,
        f"{measured.loss:.4f}",
        f"{reading.value:.4f} (float {base.value:.4f})",
        "{:+.2f} ({:+.2f} … {:+.2f})".format(
            *(100 * part for part in (measured.drop, sure.low, sure.high))
        ),
        lost,
        f"{seconds:.0f}",
    ]
    print(line(row), flush=True)
    return row


@click.command()
@click.argument("names", nargs=-1)
@click.option("--seeds", default=1, show_default=True, help="How often each case is trained.")
@click.option(
    "--only",
    type=click.Choice((*KINDS, ALL)),
    default=ALL,
    show_default=True,
    help="Train in one way; rows of the other stay.",
)
def main(names: tuple[str, ...], seeds: int, only: str) -> None:
    """Measure NAMES (default: all) and write the report, in which other cases' rows stay."""
    keep_freed_memory()
    chosen = [name for name in CASES if not names or name in names]
    with tempfile.TemporaryDirectory() as folder:
        new = {name: rows_of(CASES[name], Path(folder), seeds, only) for name in chosen}
    before = REPORT.read_text(encoding="utf-8") if REPORT.exists() else ""
    rows = []
    for name, case in CASES.items():
        kept = [r for r in before.splitlines() if r.startswith(f"| {case.title} |")]
        if name in new:
            made = [line(row) for row in new[name]]
            others = [r for r in kept if only != ALL and r.split(" | ")[1] not in ("fitted", only)]
            kept = sorted([*made, *others], key=lambda r: ORDER.index(r.split(" | ")[1]))
        rows += kept
    titles = [case.title for case in CASES.values()]
    text = [
        "# What training adds",
        "",
        "By `python -m tests.benchmarks.training`. All weights have the bits said (W), a scale per",
        "channel and no zero point, first and last layer too; in groups of 32 each has a scale and",
        "a zero point. Activations have the bits after A; embeddings of MiniLM have 4. `fitted` is",
        "`autoquant tune` with far rows counting less;",
        "`blocks` goes on from that, as `--method block` does, and so does `trained`, as",
        "`--method full` does, on the unlabelled inputs of the task's `training_data`, or those to",
        "calibrate with. Loss (how far outputs are from the float model's) and metric are of the",
        "confirm split, by the reference, by which nothing is",
        "chosen. `weights that became 0` are weights that are not 0 in the float model and are in",
        "the quantized one, before and after training. Rates of each case are in",
        "`tests/benchmarks/training.py`. The sections below are by",
        "`python -m tests.benchmarks.challenges`, of which every run is in `training.jsonl`.",
        "",
        machines(before, [CASES[name].title for name in chosen], titles),
        "",
        line(HEAD),
        line(["---"] * len(HEAD)),
        *rows,
    ]
    # The sections of ``tests.benchmarks.challenges`` come after that, and stay.
    _, *sections = before.split(RULE)
    REPORT.write_text(RULE.join(["\n".join(text) + "\n", *sections]), encoding="utf-8")


if __name__ == "__main__":
    main()
