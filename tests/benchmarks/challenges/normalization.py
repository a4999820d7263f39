"""BatchNorm: folded and learned with its layer, or set anew by data once training is over.

Norms that follow a layer are folded into it, so that their scales and shifts are the layer's scale
a channel and its bias, which learn. Setting statistics anew after training (Nagel et al. 2022,
arXiv 2203.11086, section 5.2) is then this: layer by layer, in the order in which they run, the
mean of each channel's output, or mean and deviation, are brought to those of the float model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from autoquant.methods.learned import LearnedWeight
from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.nn.layer_output import as_real
from autoquant.spec.recipe import SiteRecipe
from tests.benchmarks.challenges.lab import Lab, Sites
from tests.benchmarks.challenges.rows import Row, Rows, interval, ordered, table, values
from tests.benchmarks.training import HIGH, LOW

SECTION = "normalization"
CASES: tuple[tuple[str, Distillation], ...] = (
    ("resnext", replace(HIGH, steps=400)),
    ("mobilenet_v2", replace(LOW, steps=100)),
)
MEANS, BOTH = "means set anew", "means and deviations set anew"
START, TRAINED = "start", "trained, as learned"
MOST = 2.0
"""Times that a channel's scale is changed, at most."""


def measure(rows: Rows, seeds: int) -> None:
    """Train, and set statistics anew afterwards."""
    for name, usual in CASES:
        lab = Lab(name)
        rows.make((SECTION, lab.title, START, 0), functools.partial(_judged, lab, START, None))
        for seed in range(seeds):
            once = functools.cache(functools.partial(_trained, lab, usual, seed))
            for way in (TRAINED, MEANS, BOTH):
                key = (SECTION, lab.title, way, seed)
                rows.make(key, functools.partial(_judged, lab, way, once))


def _trained(lab: Lab, technique: Distillation, seed: int) -> Sites:
    return lab.train(technique, seed).sites


def _judged(lab: Lab, way: str, trained: Callable[[], Sites] | None) -> Row:
    sites = lab.start if trained is None else trained()
    if way in (MEANS, BOTH):
        sites = set_anew(lab, sites, deviations=way == BOTH)
    with lab.session.without_reuse():
        measured, reading, _ = lab.session.measure(sites, "confirm")
    return {"loss": measured.loss, "metric": reading.value}


def set_anew(lab: Lab, sites: Sites, *, deviations: bool) -> Sites:
    """Return sites whose layers' outputs have the float model's means, on what is calibrated with.

    With ``deviations`` those, too.
    """
    applier, done = lab.session.applier, dict(sites)
    for site in lab.session.prepared.sites:
        own = done[site.name]
        if own.learned is None or not site.corrects:
            continue
        applier.to_float()
        mean, deviation = _statistics(lab, site.users[0][0])
        applier.apply(done)
        mean_now, deviation_now = _statistics(lab, site.users[0][0])
        ratio = torch.ones_like(mean)
        if deviations:
            # Of a channel that is always 0 there is nothing to set.
            ratio = (deviation / deviation_now).nan_to_num(1.0).clamp(1 / MOST, MOST)
        done[site.name] = _moved(lab, own, site.users[0][0], ratio, mean - ratio * mean_now)
    applier.to_float()
    return done


def _statistics(lab: Lab, path: str) -> tuple[Tensor, Tensor]:
    """Return the means and deviations of the channels of one layer's output."""
    session, seen = lab.session, list[Tensor]()
    module = session.prepared.model.get_submodule(path)
    handle = module.register_forward_hook(lambda *call: seen.append(as_real(call[2]).detach()))
    with torch.no_grad():
        for inputs in session.splits.calibrate:
            session.evaluator.run(session.prepared.model, inputs)
    handle.remove()
    y = torch.cat(seen)
    rest = [0, *range(2, y.dim())]
    return y.mean(rest), y.std(rest)


def _moved(lab: Lab, own: SiteRecipe, path: str, ratio: Tensor, shift: Tensor) -> SiteRecipe:
    """Return the recipe of a layer that gives its output times ``ratio``, and ``shift`` more."""
    applier = lab.session.applier
    was = applier.learned[own.learned]
    bias = lab.session.prepared.model.get_submodule(path).bias
    fixed = torch.zeros_like(shift) if bias is None else bias.detach()
    moved = (fixed + was.shift) * ratio + shift - fixed
    new = LearnedWeight(was.q, was.scale * ratio.reshape(-1, 1), was.zero_point, moved)
    applier.learned[new.digest] = new
    return replace(own, learned=new.digest)


def text(rows: list[Row]) -> list[str]:
    """Return the section."""
    lines = [
        "BatchNorms that follow a layer are folded into it: their scales and shifts learn, as the",
        "layer's scale a channel and its bias. Beside that, the means of each channel's outputs,",
        "or means and deviations, are brought to those of the float model after training, layer",
        "by layer, on what is calibrated with, as setting statistics anew would. Loss and metric",
        "on the confirm split.",
        "",
    ]
    for case in ordered(rows, "case"):
        own = [row for row in rows if row["case"] == case]
        lines += [f"**{case}**, seeds: {len({row['seed'] for row in own})}", ""]
        body = [
            [name, *(interval(values(own, what, variant=name)) for what in ("loss", "metric"))]
            for name in ordered(own, "variant")
        ]
        lines += [*table(["statistics", "loss", "metric"], body), ""]
    return lines
