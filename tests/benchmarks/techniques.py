"""Which technique suits which model: ``python -m tests.benchmarks.techniques``.

For each model of the zoo all weights have the same few bits, first and last layer too, and
activations have 8; only the grids of weights, and how they are rounded, differ. Nothing is searched
and nothing is chosen by what is reported: the metric and the loss (how far outputs are from the
float model's) are of the confirm split, computed by the reference. Techniques see the unlabelled
calibration data alone. The language model has what such models are deployed with: groups of 64
weights with a zero point each, 8 bits for the embedding that is its head too, and a scale for each
token. MobileNetV2 has rows of its own for how many photos there are to calibrate with. Writes
``reports/techniques.md``; where models are named, it replaces their rows there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import click
import torch

from autoquant.heap import keep_freed_memory
from autoquant.methods.reconstruction.sequential import EVERY_ROW, Sequential
from autoquant.methods.rounding.coordinate_descent import CoordinateDescent
from autoquant.methods.rounding.gptq import GPTQ
from autoquant.methods.rounding.learned_rounding import LearnedRounding
from autoquant.models.data import Splits
from autoquant.models.noninferiority import drop_interval
from autoquant.session.session import Session, open_session
from autoquant.session.transforms import transform_inputs
from autoquant.session.tuning import fit_layers
from autoquant.spec.recipe import SiteRecipe
from autoquant.spec.space import SearchSpace
from autoquant.spec.techniques import NEAREST, UNCORRECTED, Rounding
from autoquant.spec.uniform import uniform
from autoquant.study.source import Source
from tests.benchmarks.evaluation import line
from tests.benchmarks.machine import machines
from tests.benchmarks.zoo import TITLES
from tests.zoo.conftest import HERE, task_module

HEAD = ["model", "bits", "technique", "loss", "metric", "drop in points (95%)", "CPU seconds"]
REPORT = Path(__file__).resolve().parents[2] / "reports" / "techniques.md"
PHOTOS = {"mobilenet_v2_128": 128, "mobilenet_v2_512": 512}
"""Photos to calibrate with, where the last 472 of the shuffle measure and nothing selects."""
BITS = {
    "mobilenet_v2": (4,),
    **dict.fromkeys(PHOTOS, (4,)),
    "minilm": (4, 3),
    "g2p": (4, 3),
    "resnext": (3, 2),
    "smollm2": (4, 3),
}
ALL_TITLES = {
    **TITLES,
    **{n: f"MobileNetV2, {count} photos, tested on 472" for n, count in PHOTOS.items()},
    "smollm2": "SmolLM2-135M, news, groups of 64",
}
SPACE = """\
autoquant_space: 1
name: techniques
rules:
  - weight_bits: [8, 6, 4, 3, 2]
    weight_granularity: [GRANULARITY]
    weight_scheme: [SCHEME]
    weight_calibration: [output_mse]
    correction: [bias]
    activation_bits: [8]
    activation_calibration: [mse]
"""
GRIDS = {
    "": ("per_channel", "symmetric"),
    "zero points: ": ("per_channel", "asymmetric"),
    "groups of 32, zero points: ": ("per_group_32", "asymmetric"),
}
"""What the grids of weights are, by what is said of a technique on them."""
GROUPED = ("minilm", "g2p")
"""Models all of whose layers have inputs by the 32."""
LANGUAGE_SPACE = """\
autoquant_space: 1
name: techniques
rules:
  - weight_bits: [4, 3]
    weight_granularity: [per_group_64]
    weight_scheme: [asymmetric]
    weight_calibration: [output_mse]
    correction: [bias]
    activation_bits: [8]
    activation_granularity: [per_token]
    activation_scheme: [asymmetric]
  - types: [Embedding]
    weight_bits: [8]
    weight_granularity: [per_channel]
"""
SLOW = ("the same, learned_rounding 0.01", "tune", "tune, all rows alike")
"""Techniques that are not tried on the 211 layers of SmolLM2; the first on plain grids alone."""
Sites = Mapping[str, SiteRecipe]
Make = Callable[[Session, Sites], Sites]


def rounded(rounding: Rounding) -> Make:
    """Return what rounds every layer that an activation meets in one way."""

    def make(session: Session, sites: Sites) -> Sites:
        found = {}
        for name, site in sites.items():
            rounds = site.weight is not None and session.prepared.slots[name].site.activation
            weight = replace(site.weight, rounding=rounding) if rounds else site.weight  # type: ignore[type-var]
            found[name] = replace(site, weight=weight)
        return session.applier.apply(found)

    return make


def naive(session: Session, sites: Sites) -> Sites:
    """Round to the nearest of the widest range, and correct nothing."""
    found = {}
    for name, site in sites.items():
        weight = None if site.weight is None else replace(site.weight, calibration="max")
        found[name] = SiteRecipe(weight, site.activation, UNCORRECTED)
    return session.applier.apply(found)


def fitted(technique: Sequential) -> Make:
    """Return what fits the layers to each other."""

    def make(session: Session, sites: Sites) -> Sites:
        return fit_layers(session, sites, technique)

    return make


TECHNIQUES: dict[str, Make] = {
    "max, nearest": naive,
    "output_mse, bias: nearest": rounded(NEAREST),
    "the same, gptq": rounded(GPTQ()),
    "the same, coordinate_descent": rounded(CoordinateDescent()),
    "the same, learned_rounding 0.01": rounded(LearnedRounding(0.01)),
    "tune": fitted(Sequential()),
    "tune, all rows alike": fitted(Sequential(far=EVERY_ROW)),
}


def rows_of(name: str, folder: Path) -> list[list[str]]:
    """Return the rows of one model."""
    session = opened(name, folder)
    session.reuse()
    rows: list[list[str]] = []
    for grid, text in spaces_of(name).items():
        spaces = SearchSpace.parse(text, "techniques").resolve(session.prepared.sites)
        transform_inputs(session, spaces)  # of the last space: what is rotated stays so
        for bits in (3,) if "groups" in grid else BITS[name]:
            for title, make in TECHNIQUES.items():
                if title in (SLOW if name == "smollm2" else SLOW[:1] if grid else ()):
                    continue
                began = time.process_time()
                sites = make(session, uniform(spaces, bits))
                seconds = time.process_time() - began
                rows.append(row_of(session, name, bits, grid + title, sites, seconds))
    return rows


def spaces_of(name: str) -> dict[str, str]:
    """Return the spaces of a model's uniform recipes, by what is said of their grids."""
    if name == "smollm2":
        rotated = LANGUAGE_SPACE.replace(
            "[asymmetric]\n  -", "[asymmetric]\n    rotation: [64]\n  -"
        )
        return {"": LANGUAGE_SPACE, "rotated by 64: ": rotated}
    return {
        said: SPACE.replace("GRANULARITY", granularity).replace("SCHEME", scheme)
        for said, (granularity, scheme) in GRIDS.items()
        if granularity == "per_channel" or name in GROUPED
    }


def opened(name: str, folder: Path) -> Session:
    """Return the session of one model."""
    photos = PHOTOS.get(name)
    name = name if photos is None else "mobilenet_v2"
    module = task_module(name)
    path = folder / "resnext.pt" if name == "resnext" else Path(module.weights())
    if name == "resnext":
        module.train(path)
    source = Source(str(path), str(HERE / f"{name}.py"))
    task, splits = source.load_task(), None
    if photos is not None:
        splits = Splits(
            calibrate=tuple(x for x, _ in module.batches(0, photos)),
            search=tuple(module.batches(max(PHOTOS.values()), -module.TEST)),
            confirm=tuple(module.batches(-module.TEST, None)),
            samples={"calibrate": photos, "search": 16, "confirm": module.TEST},
            notes=(),
        )
    return open_session(source.load(task), task, torch.device("cpu"), splits=splits)


def row_of(
    session: Session, name: str, bits: int, title: str, sites: Sites, seconds: float
) -> list[str]:
    """Return what one model with one technique gives on the confirm split."""
    base = session.baseline("confirm")
    with session.prepared.engine.reference(), session.without_reuse():
        measured, reading, _ = session.measure(sites, "confirm")
    assert base.evidence is not None
    assert reading.evidence is not None
    sure = drop_interval(base.evidence, reading.evidence, base.metric)
    scale = base.value if name == "smollm2" else 1.0  # of a perplexity, percent of it
    row = [
        ALL_TITLES[name],
        str(bits),
        title,
        f"{measured.loss:.4f}",
        f"{reading.value:.4f} (float {base.value:.4f})",
        "{:+.2f} ({:+.2f} … {:+.2f})".format(
            *(100 * part / scale for part in (measured.drop, sure.low, sure.high))
        ),
        f"{seconds:.1f}",
    ]
    print(line(row), flush=True)
    return row


@click.command()
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    """Measure NAMES (default: all) and write the report, in which other models' rows stay."""
    keep_freed_memory()
    before = REPORT.read_text(encoding="utf-8") if names else ""
    kept, rows = before.splitlines(), []
    with tempfile.TemporaryDirectory() as folder:
        for name in BITS:
            if not names or name in names:
                rows += map(line, rows_of(name, Path(folder)))
            else:
                rows += [row for row in kept if row.startswith(f"| {ALL_TITLES[name]} |")]
    text = [
        "# Which technique suits which model",
        "",
        "By `python -m tests.benchmarks.techniques`. All weights have the same few bits, a scale",
        "per channel and no zero point where nothing else is said, first and last layer too;",
        "activations have 8. Nothing is searched, and techniques see the calibration data alone,",
        "without labels. Loss (how far outputs are from the float model's) and metric are of the",
        "confirm split, by the reference. `tune` is `autoquant tune`, which tries both of its ways",
        "and keeps what is best on the search split. The language model has groups of 64 weights",
        "with a zero point each, 8 bits for the embedding that is its head too, and a scale for",
        "each token; its drop is in percent of float perplexity; neither learned rounding nor",
        "tuning was run on it. Where MobileNetV2 is tested on 472 photos, its float accuracy is",
        "that which is published of them, and no others select anything.",
        "",
        machines(before, [ALL_TITLES[name] for name in names or BITS], list(ALL_TITLES.values())),
        "",
        line(HEAD),
        line(["---"] * len(HEAD)),
        *rows,
    ]
    REPORT.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
