"""Fitting the layers of a recipe to each other, on a session's calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from autoquant.errors import TrialError
from autoquant.measure.evaluator import OUT_OF_MEMORY, out_of_memory
from autoquant.methods.reconstruct import KINDS, reconstruct
from autoquant.methods.reconstruction.sequential import Sequential
from autoquant.models.usercode import guarded
from autoquant.session.session import Say, Session
from autoquant.spec.recipe import FLOAT_SITE, SiteRecipe

RIDGES = (200.0, 20000.0)
"""How strongly weights are drawn to the float ones: which is best differs by model. Convolutions
and transformers gain most by little, recurrent layers lose by it."""


def techniques(ridges: Sequence[float] = RIDGES) -> tuple[Sequential, ...]:
    """Return the ways to fit layers that are tried, one for each ridge."""
    return tuple(Sequential(ridge) for ridge in ridges)


def why_not(session: Session, sites: Mapping[str, SiteRecipe]) -> str | None:
    """Return in one line why the layers of a recipe can't be fitted, None where they can."""
    if not _batches(session):
        return "the task gives no calibration data, which tuning learns from"
    if not fitted(session, sites):
        return "the recipe quantizes no layer that can be fitted"
    return None


def fitted(session: Session, sites: Mapping[str, SiteRecipe]) -> list[str]:
    """Return the names of the layers that fitting a recipe learns."""
    return [
        site.name
        for site in session.prepared.sites
        if sites.get(site.name, FLOAT_SITE).weight is not None
        and site.activation
        and site.kind in KINDS
    ]


def fit_layers(
    session: Session,
    sites: Mapping[str, SiteRecipe],
    technique: Sequential,
    progress: Say = lambda _: None,
) -> dict[str, SiteRecipe]:
    """Return ``sites`` with weights fitted one after another; what was learned is the applier's.

    ``progress`` hears the name of each layer as its turn comes, and may raise to end it. Raises
    TrialError where the user's code fails on the quantized model, or memory runs out.
    """

    def run(model: nn.Module, inputs: Any) -> Any:
        with guarded(_failed, session.task.source, OUT_OF_MEMORY):
            return session.evaluator.run(model, inputs)

    try:
        with session.without_reuse():
            return reconstruct(session.applier, sites, _batches(session), run, technique, progress)
    except OUT_OF_MEMORY as error:
        raise out_of_memory(error) from error


def _failed(reason: str) -> TrialError:
    return TrialError(f"the quantized model fails on the calibration data: {reason}")


def _batches(session: Session) -> list[Any]:
    return [batch for batch in session.splits.calibrate if batch is not None]
