"""Fitting the layers of a recipe to each other, on a session's calibration data."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from autoquant.errors import TrialError
from autoquant.measure.evaluator import OUT_OF_MEMORY, out_of_memory
from autoquant.methods.reconstruct import KINDS, Around, reconstruct
from autoquant.methods.reconstruction.sequential import EVERY_ROW, Sequential
from autoquant.models.usercode import guarded
from autoquant.session.session import Say, Session
from autoquant.spec.recipe import FLOAT_SITE, SiteRecipe

WAYS = (Sequential(), Sequential(far=EVERY_ROW))
"""The ways to fit layers that are tried: which is best differs by model. Rows that are far off
rule the fit of most, above all of recurrent ones; some gain by what they say."""


def techniques(ridges: Sequence[float] = ()) -> tuple[Sequential, ...]:
    """Return the ways to fit layers that are tried, one for each ridge if any is given."""
    return tuple(Sequential(ridge) for ridge in ridges) or WAYS


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

    def fit(around: Around) -> dict[str, SiteRecipe]:
        batches = _batches(session)
        return reconstruct(session.applier, sites, batches, run, technique, progress, around)

    reuse = session.evaluator.reuse
    if reuse is not None and reuse.on:
        reuse.store.clear()
        try:
            found = fit(lambda number: reuse.batch(("fit", number)))
            if reuse.on:
                return found
        except OUT_OF_MEMORY:
            reuse.shrink()
        finally:
            reuse.store.clear()
    # Without what is kept there may be room; and what showed that the model can't have its results
    # reused may have come too late.
    try:
        return fit(lambda _: contextlib.nullcontext())
    except OUT_OF_MEMORY as error:
        raise out_of_memory(error) from error


def _failed(reason: str) -> TrialError:
    return TrialError(f"the quantized model fails on the calibration data: {reason}")


def _batches(session: Session) -> list[Any]:
    return [batch for batch in session.splits.calibrate if batch is not None]
