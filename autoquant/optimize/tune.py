"""``autoquant tune``: a recipe's layers are fitted to each other, or trained, if that helps."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autoquant.errors import TrialError, UserError
from autoquant.methods.learned import is_learned, learned_path, write_learned
from autoquant.methods.reconstruction.blockwise import Blockwise
from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.methods.reconstruction.sequential import Sequential
from autoquant.methods.training import Training
from autoquant.models.files import LoadedModel
from autoquant.models.task import Task
from autoquant.models.usercode import interruptible
from autoquant.optimize.evaluate import margin_of
from autoquant.selection.confirmation import confirm_one
from autoquant.session.session import Session, choose_device, open_session
from autoquant.session.training import train_blocks, train_layers
from autoquant.session.tuning import fit_layers, techniques, why_not
from autoquant.spec.goal import Goal
from autoquant.spec.outputs import check_target, is_signed
from autoquant.spec.recipe import Recipe, SiteRecipe
from autoquant.spec.recipe_file import save
from autoquant.spec.techniques import Reconstruction
from autoquant.training.train import Moment, Step
from autoquant.training.turn import BlockDone

MOST_RIDGE = 1e9


@dataclass(frozen=True)
class Tried:
    """One way to tune, and the loss that it gave on the search split.

    ``findings`` are what went wrong on the way, and what was done about it. ``lost`` are the shares
    of weights that are 0 in the quantized model alone, before and after, where that is known.
    ``layers`` is what the rates of each layer were multiplied by, empty where all learned alike.
    """

    technique: Reconstruction
    loss: float
    seconds: float
    findings: tuple[str, ...] = ()
    lost: tuple[float, float] | None = None
    layers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuned:
    """What tuning came to.

    ``recipe`` is the best one, with its evidence: as it was where nothing made it better.
    ``before`` and ``after`` are losses on the search split.
    """

    recipe: Recipe
    before: float
    after: float
    tried: tuple[Tried, ...]

    @property
    def gained(self) -> bool:
        """Whether any way to tune made the recipe better."""
        return self.after < self.before

    def plain(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        rows = [
            {
                "technique": row.technique.plain(),
                "loss": row.loss,
                "seconds": row.seconds,
                "findings": list(row.findings),
                "lost": row.lost,
                "layer_rates": dict(row.layers),
            }
            for row in self.tried
        ]
        return {"before": self.before, "after": self.after, "gained": self.gained, "tried": rows}


def check_tuned(
    path: Path, recipe: Recipe, inputs: Mapping[str, str | Path | None] | None = None
) -> None:
    """Raise UserError where to write a tuned recipe would take something from the user.

    What ``recipe`` has learned already lies where a recipe may still need it.
    """
    own = None if recipe.learned is None else recipe.learned.path
    files = {"recipe's learned file": own, **(inputs or {})}
    check_target(path, is_signed, files)
    check_target(learned_path(path), is_learned, files)


@interruptible()
def tune(
    loaded: LoadedModel,
    task: Task,
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    ridges: Sequence[float] = (),
    training: Training | None = None,
    device: str = "auto",
    backend: str = "auto",
    say: Callable[[str], None] = lambda _: None,
    watch: Callable[[Moment], None] = lambda _: None,
    follow: Callable[[Step], None] = lambda _: None,
    block: Callable[[BlockDone], None] = lambda _: None,
) -> Tuned:
    """Fit the layers of ``recipe`` to each other and write the best recipe to ``out``.

    What was learned goes beside it, as NAME.learned.safetensors. Each of ``ridges`` is tried,
    without any the ways that a search tries; what is best then is trained, where ``training`` says
    how: ``watch`` hears each check of that, ``follow`` each step, ``block`` each block. The recipe
    itself is what is written where nothing makes the loss on the search split less. Training that
    was interrupted is gone on with: what it needs lies beside ``out`` until it ends, as
    NAME.training.safetensors. Raises UserError where the task gives no calibration data, or the
    user's code fails.
    """
    path = Path(os.path.abspath(out))
    check_tuned(path, recipe)
    for ridge in ridges:
        if not 0.0 <= ridge <= MOST_RIDGE:
            raise UserError(f"ridge {ridge:g}: give a number from 0 to {MOST_RIDGE:g}")
    session = open_session(
        loaded, task, choose_device(device), recipe=recipe, backend=backend, say=say
    )
    try:
        best, found = _best(session, task, recipe, ridges, say)
        if training is not None:
            best, found = _trained(session, best, found, training, path, say, watch, follow, block)
        goal = Goal(margin_of(session.baseline("search"), recipe), session.sizes.float_size_bytes)
        say("confirming")
        with session.prepared.engine.reference():
            confirmed = confirm_one(session, best, goal, recipe.seed).recipe
    except TrialError as error:
        raise UserError(f"{task.source}: {error}") from error
    check_tuned(path, recipe)  # again: it may have been edited meanwhile
    written = replace(confirmed, reconstruction=recipe.reconstruction, learned=recipe.learned)
    learned = [site.learned for site in confirmed.sites.values() if site.learned]
    if learned:
        weights = [session.applier.learned[digest] for digest in learned]
        chosen = min(found.tried, key=lambda row: row.loss).technique if found.gained else None
        written = replace(
            confirmed,
            reconstruction=recipe.reconstruction if chosen is None else chosen,
            learned=write_learned(weights, learned_path(path)),
        )
    save(written, path)
    return replace(found, recipe=written)


def training_path(recipe: Path) -> Path:
    """Return where training for a recipe keeps what it needs to go on."""
    return recipe.with_name(recipe.stem + ".training.safetensors")


def _trained(
    session: Session,
    start: Mapping[str, SiteRecipe],
    found: Tuned,
    technique: Training,
    path: Path,
    say: Callable[[str], None],
    watch: Callable[[Moment], None],
    follow: Callable[[Step], None],
    block: Callable[[BlockDone], None],
) -> tuple[dict[str, SiteRecipe], Tuned]:
    """Return the sites after training, and how they came about."""
    began = time.monotonic()
    kept, seed = training_path(path), found.recipe.seed
    if isinstance(technique, Blockwise):
        say(f"training one block after another ({technique})")
        best = min(found.tried, key=lambda row: row.loss).technique if found.gained else None
        fit = best if isinstance(best, Sequential) else None
        done = train_blocks(
            session, start, technique, fit=fit, watch=block, checkpoint=kept, seed=seed
        )
    else:
        assert isinstance(technique, Distillation)
        say(f"training all layers together ({technique})")
        done = train_layers(
            session, start, technique, watch=watch, follow=follow, checkpoint=kept, seed=seed
        )
    kept.unlink(missing_ok=True)
    seconds = round(time.monotonic() - began, 3)
    findings = tuple(map(str, done.findings))
    row = Tried(done.technique, done.after, seconds, findings, done.lost, done.layers)
    after = min(found.after, done.after)
    return dict(done.sites), replace(found, after=after, tried=(*found.tried, row))


def _best(
    session: Session,
    task: Task,
    recipe: Recipe,
    ridges: Sequence[float],
    say: Callable[[str], None],
) -> tuple[dict[str, SiteRecipe], Tuned]:
    """Return the best sites, and how they came about."""
    if (reason := why_not(session, recipe.sites)) is not None:
        raise UserError(f"{task.source}: {reason}")
    say("measuring the recipe as it is")
    measured, _, best = session.measure(recipe.sites, "search")
    session.reuse(say=say)
    before = after = measured.loss
    tried = []
    for technique in techniques(ridges):
        began = time.monotonic()
        say(f"fitting the layers to each other ({technique})")
        sites, loss = dict(recipe.sites), math.inf
        try:
            sites = fit_layers(session, recipe.sites, technique)
            with session.without_reuse():
                loss = session.measure(sites, "search")[0].loss
        except TrialError as error:  # outputs that are not finite, say: as bad as can be
            say(f"{technique}: {error}")
        tried.append(Tried(technique, loss, round(time.monotonic() - began, 3)))
        if loss < after:
            best, after = sites, loss
    session.evaluator.reuse = None
    return best, Tuned(recipe, before, after, tuple(tried))
