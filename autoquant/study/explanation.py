"""Why a layer got what it got: its profile, kept with the study, beside the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoquant.errors import StudyError
from autoquant.registry import unknown
from autoquant.sensitivity.profile import Profile
from autoquant.spec.formats import FLOAT_BITS
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.recipe_file import loads
from autoquant.spec.techniques import NEAREST
from autoquant.study.ledger import Ledger
from autoquant.study.trials import RECIPE

FIELD = "profile"
"""Field that a study notes."""


@dataclass(frozen=True)
class Choice:
    """One choice of a layer: estimated loss and its standard error (None: not by gradients)."""

    label: str
    bits: int
    loss: float
    error: float | None
    chosen: bool


@dataclass(frozen=True)
class Why:
    """The profile of one layer; ``rank`` is its place among all by loss of what was chosen."""

    layer: str
    weights: tuple[Choice, ...]
    activations: tuple[Choice, ...]
    samples: int
    numel: int
    loss: float | None
    share: float | None
    rank: int | None
    layers: int


def plain(profile: Profile) -> dict[str, Any]:
    """Return a profile as a study notes it."""
    sites = {}
    for name, weights in profile.weight_damage.items():
        errors = profile.errors.get(name, {})
        sites[name] = {
            "numel": profile.numel[name],
            "weights": [
                [w.bits, w.granularity, w.scheme, _how(w), damage, errors.get(w)]
                for w, damage in weights.items()
            ],
            "activations": [
                [a.bits, a.granularity, a.scheme, a.calibration, damage, errors.get(a)]
                for a, damage in profile.activation_damage[name].items()
            ],
        }
    return {"samples": profile.samples, "reason": profile.reason, "sites": sites}


def why(ledger: Ledger, layer: str) -> Why:
    """Return why ``layer`` got what it got; StudyError where the study has no such profile."""
    kept = _kept(ledger)
    if layer not in kept["sites"]:
        raise StudyError(unknown("layer", layer, tuple(kept["sites"])))
    recipe = _recipe(ledger)
    losses = shares(ledger)
    site = None if recipe is None else recipe.get(layer)
    row = kept["sites"][layer]
    ranked = sorted(losses, key=lambda name: -losses[name])
    total = sum(losses.values())
    known = layer in losses
    return Why(
        layer,
        _choices(row["weights"], None if site is None else site.weight),
        _choices(row["activations"], None if site is None else site.activation),
        kept["samples"],
        row["numel"],
        losses.get(layer),
        losses[layer] / total if known and total > 0 else None,
        ranked.index(layer) + 1 if known else None,
        len(kept["sites"]),
    )


def shares(ledger: Ledger) -> dict[str, float]:
    """Return the estimated loss of what each layer got; empty where there is no recipe yet."""
    kept, recipe = _kept(ledger), _recipe(ledger)
    if recipe is None:
        return {}
    found = {}
    for name, row in kept["sites"].items():
        site = recipe.get(name, SiteRecipe())
        halves = (
            *_choices(row["weights"], site.weight),
            *_choices(row["activations"], site.activation),
        )
        found[name] = sum(choice.loss for choice in halves if choice.chosen)
    return found


def _how(scheme: WeightScheme | ActivationScheme) -> str:
    """Return how numbers get to their grid, as the table of a study has it."""
    if isinstance(scheme, ActivationScheme) or scheme.rounding == NEAREST:
        return scheme.calibration
    return f"{scheme.calibration}, {scheme.rounding}"


def _kept(ledger: Ledger) -> Mapping[str, Any]:
    kept = ledger.header.get(FIELD)
    if kept is None:
        raise StudyError(
            f"study {ledger.name} has no profile: only the default sampler makes one, before its "
            "first own trial"
        )
    return kept


def _recipe(ledger: Ledger) -> Mapping[str, SiteRecipe] | None:
    if RECIPE not in ledger.header:
        return None
    return loads(ledger.header[RECIPE]["text"], f"study {ledger.name}").sites


def _choices(rows: Sequence[Sequence[Any]], chosen: Any) -> tuple[Choice, ...]:
    """Return the choices of a table, the widest and least harmful first, and float."""
    own = None if chosen is None else (chosen.bits, chosen.granularity, chosen.scheme, _how(chosen))
    found = [
        Choice(f"{g} {s} {c}", bits, loss, error, own == (bits, g, s, c))
        for bits, g, s, c, loss, error in rows
    ]
    if own is None and rows:
        found.append(Choice("float", FLOAT_BITS, 0.0, None, True))
    return tuple(sorted(found, key=lambda c: (-c.bits, c.loss)))
