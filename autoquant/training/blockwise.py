"""Training one block after another, each on what the trained ones before it give."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoquant.errors import TrialError
from autoquant.methods.applier import Applier
from autoquant.methods.learned import PARTS, LearnedWeight
from autoquant.methods.reconstruction.blockwise import Blockwise
from autoquant.methods.reconstruction.sequential import Sequential
from autoquant.spec.recipe import SiteRecipe
from autoquant.spec.techniques import CORRECTIONS, UNCORRECTED
from autoquant.training.blocks import find_blocks, samples_of, usual_numbers
from autoquant.training.checkpoint import read_checkpoint, write_checkpoint
from autoquant.training.guard import Finding
from autoquant.training.held import AS_IT_WAS, BY_CHANCE, Measure, Sites
from autoquant.training.train import Trained, lost_of, student_of
from autoquant.training.turn import BlockDone, School, Turn, measured

LEFT = "left as it was fitted"


def train_blockwise(
    applier: Applier,
    sites: Sites,
    school: School,
    technique: Blockwise,
    measure: Measure,
    *,
    fit: Sequential | None = None,
    watch: Callable[[BlockDone], None] = lambda _: None,
    heed: Callable[[int, int], None] = lambda *_: None,
    checkpoint: tuple[Path, str] | None = None,
) -> Trained:
    """Train the blocks of a quantized model in turn; return the best of before and after.

    ``measure`` is the loss of a recipe on data that training does not learn from. ``fit`` is how
    the layers of a block are fitted to X̂ first. ``heed`` hears the step that is to come, of how
    many in all, and may raise to end it. A ``checkpoint``, (file, what it is of), is written after
    each block and gone on from. The model is left in float; what is returned is in
    ``applier.learned``. Raises TrialError where no block can be trained.
    """
    before = measure(sites)
    lost = lost_of(student_of(applier, sites, technique))
    done = applier.apply(sites)
    quantized = [s for s in applier.prepared.sites if done[s.name].weight is not None]
    applier.to_float()
    blocks, left = find_blocks(
        applier.prepared.model, quantized, school.batches, school.run, technique.most
    )
    findings = [Finding(0, name, f"can't be trained: {why}", LEFT) for name, why in left.items()]
    if not blocks:
        raise TrialError(f"no block can be trained: {'; '.join(dict.fromkeys(left.values()))}")
    device = next(iter(applier.prepared.slots.values())).parameter.device
    state = None if checkpoint is None else read_checkpoint(*checkpoint, device)
    known = set(applier.learned)
    begin, trained = 0, 0
    if state is not None:
        begin, trained = state["blocks"], state["trained"]
        done = _restored(applier, done, state)
        findings = [Finding(*row) for row in state["findings"]]
    usual = usual_numbers(blocks)
    for number, block in enumerate(blocks[begin:], begin):
        samples = samples_of(block, technique.batch, usual)
        own = replace(technique, batch=samples)
        turn = Turn(applier, school, block, own, fit or Sequential())
        steps = functools.partial(_steps, heed, number, len(blocks), technique.steps)
        try:
            with _trusted(applier):
                found, row = turn(done, steps)
        except TrialError as error:
            findings.append(Finding(0, block.path, f"can't be trained: {error}", LEFT))
            row = BlockDone(block.path, 0, 0, math.nan, math.nan, math.nan, 0, 0)
            row = replace(row, findings=(findings[-1],))
        else:
            done, trained = found, trained + 1
            findings += row.findings
        _forget(applier, known, done)
        watch(replace(row, number=number + 1, count=len(blocks)))
        if checkpoint is not None:
            own_state = _state(applier, sites, done, number + 1, trained, findings)
            write_checkpoint(checkpoint[0], own_state, checkpoint[1])
    if not trained:
        raise TrialError(f"no block can be trained: {findings[-1].layer}: {findings[-1].what}")
    after = measured(measure, done)
    better = after.clearly_less_than(before)
    if after.loss < before.loss and not better:
        findings.append(Finding(technique.steps * len(blocks), "", BY_CHANCE, AS_IT_WAS))
    found = done if better else dict(sites)
    if not better:
        _forget(applier, known, sites)
    learned = {s.learned: applier.learned[s.learned] for s in found.values() if s.learned}
    lost_now = lost_of(student_of(applier, found, technique))
    applier.to_float()
    return Trained(
        found,
        learned if better else {},
        before.loss,
        after.loss if better else before.loss,
        technique.steps * len(blocks),
        tuple(findings),
        (lost, lost_now),
        technique,
    )


@contextlib.contextmanager
def _trusted(applier: Applier) -> Iterator[None]:
    """Don't look at the way from layers to BatchNorms that were folded into them, inside.

    The float model ran on the same data before; of a block by itself the norm may be outside.
    """
    folds = applier.prepared.folds
    folds.trust(True)
    try:
        yield
    finally:
        folds.trust(False)


def _steps(heed: Callable[[int, int], None], number: int, count: int, each: int, step: int) -> None:
    heed(number * each + step, count * each)


def _forget(applier: Applier, known: set[str], sites: Sites) -> None:
    """Drop what was learned on the way and no recipe has."""
    used = {site.learned for site in sites.values()}
    for digest in set(applier.learned) - known - used:
        del applier.learned[digest]


def _state(
    applier: Applier,
    start: Sites,
    sites: Sites,
    blocks: int,
    trained: int,
    findings: Sequence[Finding],
) -> dict[str, Any]:
    """Return what a checkpoint keeps: sites that are not as at the start, and their tensors."""
    own: dict[str, tuple[str, float | None]] = {
        name: (site.learned, site.activation.scale if site.activation else None)
        for name, site in sites.items()
        if site.learned and site.learned != start[name].learned
    }
    tensors = {
        f"{digest}|{part}": getattr(applier.learned[digest], part)
        for digest, _ in own.values()
        for part in PARTS
    }
    rows = [[f.step, f.layer, f.what, f.done] for f in findings]
    return {
        "tensors": tensors, "sites": own, "blocks": blocks, "trained": trained, "findings": rows
    }  # fmt: skip


def _restored(
    applier: Applier, sites: dict[str, SiteRecipe], state: Mapping[str, Any]
) -> dict[str, SiteRecipe]:
    """Return sites as a checkpoint has them; what they learned is the applier's."""
    done, corrects = dict(sites), {s.name: s.corrects for s in applier.prepared.sites}
    for name, (digest, scale) in state["sites"].items():
        parts = (state["tensors"][f"{digest}|{part}"].cpu() for part in PARTS)
        applier.learned[digest] = LearnedWeight(*parts)
        activation = sites[name].activation
        done[name] = replace(
            sites[name],
            learned=digest,
            correction=CORRECTIONS.get("bias")() if corrects[name] else UNCORRECTED,
            activation=activation if activation is None else replace(activation, scale=scale),
        )
    return applier.apply(done)
