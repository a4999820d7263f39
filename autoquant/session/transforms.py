"""Which layers of a search have their inputs transformed, and how: settled before the first trial.

Inputs are smoothed or rotated. For each exponent a of the space a factor of smoothing t_j is
max|x_j|^a / max|w_j|^(1 − a) (SmoothQuant, Xiao et al. 2023, arXiv 2211.10438); rotations are by
Hadamard's matrix, in blocks. The layer's own output error, after weight and activation were
quantized either way, says which is the best one, or that none is worth its time at run time. The
float model's numbers stay what they are, bit for bit, so one pass of it serves all layers. Layers
know little of the model: all is taken back where the uniform recipe of 8 bits is no nearer to the
float model's outputs on the search split.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.errors import TrialError, UserError
from autoquant.models.usercode import guarded
from autoquant.nn.calibrate import SiteStatistics, calibrate
from autoquant.nn.sites import Site
from autoquant.nn.transforms import can_rotate, can_smooth, layout_of, transform, transforms_of
from autoquant.quant.rotation import Rotation, block_of, hadamard
from autoquant.quant.smoothing import Smoothing, rounded
from autoquant.quant.transforms import InputTransform
from autoquant.sensitivity.profile import local_damage
from autoquant.session.session import Say, Session
from autoquant.spec.formats import FLOAT_BITS
from autoquant.spec.needs import EVERYTHING
from autoquant.spec.space import SiteSpace
from autoquant.spec.transforms import UNROTATED, UNSMOOTHED
from autoquant.spec.uniform import uniform

WORTH = 0.1
"""Sum of the logarithms of two errors, at the widest and the narrowest weights, that has to be
gained: a transform takes some time. A layer whose input is rotated takes no integers from the one
before."""


Make = Callable[[Site], "InputTransform | None"]


def transform_inputs(
    session: Session, spaces: Mapping[str, SiteSpace], say: Say = lambda _: None
) -> None:
    """Transform the inputs of a session's layers where ``spaces`` allow it and it pays.

    What was calibrated of them is made anew. The session is one that transforms nothing yet. Raises
    UserError where the user's code fails.
    """
    assert not transforms_of(session.prepared)
    sites = [site for site in session.prepared.sites if _allows(session, site, spaces[site.name])]
    batches = [batch for batch in session.splits.calibrate if batch is not None]
    if not sites or not batches:
        return
    say("transforming inputs")
    chosen = _choose(session, sites, spaces, batches)
    if not chosen:
        return
    before, plain = _loss(session, spaces), session.statistics
    transform(session.prepared, {name: own for name, (own, _) in chosen.items()})
    session.recalibrate({**plain, **{name: known for name, (_, known) in chosen.items()}})
    if not _loss(session, spaces) < before:
        transform(session.prepared, dict.fromkeys(chosen))
        session.recalibrate(plain)


def _choose(
    session: Session,
    sites: Sequence[Site],
    spaces: Mapping[str, SiteSpace],
    batches: Sequence[Any],
) -> dict[str, tuple[InputTransform, SiteStatistics]]:
    """Return the best transform of each site that has one which is worth it, and what it sees."""
    least: dict[str, float] = {}
    for site in sites:
        space = spaces[site.name]
        stays = 0.0 in space.smoothing and 0 in space.rotation
        score = _score(session, site, session.statistics[site.name], space)
        least[site.name] = score - WORTH if stays else math.inf
    best: dict[str, tuple[InputTransform, SiteStatistics]] = {}
    for make in _ways(session, sites, spaces, batches):
        made = {site.name: found for site in sites if (found := make(site)) is not None}
        transform(session.prepared, made)
        needs = dict.fromkeys(made, EVERYTHING)
        known = calibrate(session.prepared, batches, lambda m, x: _run(session, m, x), needs)
        for site in sites:
            if site.name in made:
                score = _score(session, site, known[site.name], spaces[site.name])
                if score < least[site.name]:
                    least[site.name] = score
                    best[site.name] = made[site.name], known[site.name]
        transform(session.prepared, dict.fromkeys(made))
    return best


def _allows(session: Session, site: Site, space: SiteSpace) -> bool:
    """Return whether the input of a site may be transformed."""
    dtype = session.prepared.slots[site.name].source.dtype
    return (can_smooth(site, dtype) and max(space.smoothing) > 0) or (
        can_rotate(site, dtype) and max(space.rotation) > 0
    )


def _ways(
    session: Session,
    sites: Sequence[Site],
    spaces: Mapping[str, SiteSpace],
    batches: Sequence[Any],
) -> list[Make]:
    """Return what makes transforms of sites, one way after another."""
    slots = session.prepared.slots
    found: list[Make] = []
    exponents = sorted({a for site in sites for a in spaces[site.name].smoothing if a > 0})
    if exponents:
        smoothed = [site for site in sites if can_smooth(site, slots[site.name].source.dtype)]
        largest = _largest_inputs(session, smoothed, batches)

    def smoothing(exponent: float, site: Site) -> Smoothing | None:
        if exponent not in spaces[site.name].smoothing:
            return None
        factors = _factors(session, site, largest.get(site.name), exponent)
        return None if factors is None else Smoothing(factors, layout_of(site))

    def rotation(most: int, site: Site) -> Rotation | None:
        weight, layout = slots[site.name].source, layout_of(site)
        if most not in spaces[site.name].rotation or not can_rotate(site, weight.dtype):
            return None
        block = block_of(layout.channels, most)
        return None if block is None else Rotation(hadamard(block, weight), layout)

    found += [functools.partial(smoothing, exponent) for exponent in exponents]
    blocks = sorted({b for site in sites for b in spaces[site.name].rotation if b > 0})
    return found + [functools.partial(rotation, block) for block in blocks]


def _loss(session: Session, spaces: Mapping[str, SiteSpace]) -> float:
    """Return the loss of the uniform recipe of 8 bits on the search split; infinite if it fails."""
    try:
        return session.measure(uniform(spaces, 8), "search")[0].loss
    except TrialError:
        return math.inf


def _run(session: Session, model: nn.Module, inputs: Any) -> Any:
    with guarded(_failed, session.task.source):
        return session.evaluator.run(model, inputs)


def _failed(reason: str) -> UserError:
    return UserError(f"the float model fails on the calibration data: {reason}")


def _largest_inputs(
    session: Session, sites: Sequence[Site], batches: Sequence[Any]
) -> dict[str, Tensor]:
    """Return max|x_j| [channels] of each site over all batches."""
    found: dict[str, Tensor] = {}

    def observer(site: Site) -> Callable[[Tensor], None]:
        layout = layout_of(site)

        @torch.inference_mode(False)
        @torch.no_grad()
        def observe(x: Tensor) -> None:
            if x.numel():
                largest = layout.over_channels(x.detach().abs()).float()
                known = found.get(site.name)
                found[site.name] = largest if known is None else torch.maximum(known, largest)

        return observe

    slots = session.prepared.slots
    for site in sites:
        slots[site.name].observe = observer(site)
    try:
        with torch.no_grad():
            for batch in batches:
                _run(session, session.model, batch)
    finally:
        for site in sites:
            slots[site.name].observe = None
    return found


def _factors(session: Session, site: Site, inputs: Tensor | None, exponent: float) -> Tensor | None:
    """Return the factors [channels] of a site by an exponent; None where they are all 1."""
    if inputs is None:
        return None
    weight = session.prepared.slots[site.name].source.float()
    if site.kind.startswith("conv"):
        columns = weight.reshape(site.groups, site.shape[0] // site.groups, site.shape[1], -1)
        largest = columns.abs().amax((1, 3)).flatten()
    else:
        largest = weight.abs().amax(site.channel_axis)
    alive = (inputs > 0) & (largest > 0)
    if not bool(alive.any()):
        return None
    factors = torch.ones_like(inputs)
    factors[alive] = rounded(inputs[alive] ** exponent / largest[alive] ** (1.0 - exponent))
    return None if bool((factors == 1).all()) else factors


def _score(session: Session, site: Site, known: SiteStatistics, space: SiteSpace) -> float:
    """Return the sum of the logarithms of the layer's relative error with few and many bits."""
    target = session.prepared.slots[site.name].target
    widths = [b for b in space.choices["weight_bits"] if b != FLOAT_BITS]
    both = tuple(dict.fromkeys((max(widths, default=8), min(widths, default=8))))
    c = space.choices
    few = dict(c) | {"weight_bits": both, "rounding": c["rounding"][:1]}
    few |= {"weight_calibration": c["weight_calibration"][:1]}
    weights, activations = local_damage(
        site, target, known, replace(space, choices=few, smoothing=UNSMOOTHED, rotation=UNROTATED)
    )
    beside = min(activations.values(), default=0.0)
    totals = []
    for bits in both:
        own = min((d for w, d in weights.items() if w.bits == bits), default=0.0)
        totals.append(math.log(max(own + beside, 1e-12)))
    return sum(totals) * 2 / len(totals)
