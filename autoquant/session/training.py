"""Training a recipe on a session's data."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.errors import TrialError
from autoquant.kernels.reference import full_float32
from autoquant.measure.evaluator import OUT_OF_MEMORY, out_of_memory
from autoquant.methods.reconstruction.blockwise import Blockwise
from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.methods.reconstruction.sequential import Sequential
from autoquant.methods.training import Training
from autoquant.models.data import training_pairs
from autoquant.models.digests import sample_digests
from autoquant.models.task import outputs_of
from autoquant.models.trees import to_device
from autoquant.models.usercode import guarded
from autoquant.session.session import Session
from autoquant.spec.recipe import SiteRecipe, choices_key
from autoquant.training.blockwise import train_blockwise
from autoquant.training.held import Held
from autoquant.training.schedule import Lessons
from autoquant.training.train import Moment, Step, Trained, train
from autoquant.training.trainer import Lesson
from autoquant.training.turn import BlockDone, School

Sites = Mapping[str, SiteRecipe]


def train_layers(
    session: Session,
    sites: Sites,
    technique: Distillation,
    *,
    watch: Callable[[Moment], None] = lambda _: None,
    follow: Callable[[Step], None] = lambda _: None,
    heed: Callable[[int], None] = lambda _: None,
    checkpoint: Path | None = None,
    seed: int = 0,
) -> Trained:
    """Train a recipe on the session's data; what was learned is the applier's.

    ``watch`` hears each check, ``follow`` each step that was taken; ``heed`` hears each step to
    come, and may raise to end it; ``checkpoint`` is a file to go on from. Raises TrialError where
    the user's code fails on the quantized model, where its outputs have no gradient, or memory runs
    out.
    """
    lesson = lesson_of(session, seed)
    kept = None
    if checkpoint is not None:
        kept = checkpoint, identity_of(session, sites, technique, lesson.inputs, seed)
    try:
        return train(
            session.applier, sites, lesson, technique, _measure_of(session),
            watch=watch, follow=follow, heed=heed, checkpoint=kept,
        )  # fmt: skip
    except OUT_OF_MEMORY as error:
        raise out_of_memory(error) from error


def train_blocks(
    session: Session,
    sites: Sites,
    technique: Blockwise,
    *,
    fit: Sequential | None = None,
    watch: Callable[[BlockDone], None] = lambda _: None,
    heed: Callable[[int, int], None] = lambda *_: None,
    checkpoint: Path | None = None,
    seed: int = 0,
) -> Trained:
    """Train the blocks of a recipe's model in turn; what was learned is the applier's.

    ``fit`` is how the layers of each block are fitted first. ``heed`` hears each step to come, of
    how many, and may raise to end it; ``checkpoint`` is a file to go on from. Raises TrialError
    where the user's code fails on the quantized model, where no block can be trained, or memory
    runs out.
    """
    fit = fit or Sequential()
    prepared, lesson = session.prepared, lesson_of(session, seed)

    def compute(module: nn.Module, args: Any, kwargs: Any) -> Any:
        with (
            prepared.in_float32(),
            guarded(_failed, session.task.source, OUT_OF_MEMORY),
            full_float32(session.device),
        ):
            return module(*args, **kwargs)

    def run(model: nn.Module, inputs: Any) -> Any:
        with prepared.in_float32(), guarded(_failed, session.task.source, OUT_OF_MEMORY):
            return session.evaluator.run(model, inputs)

    batches = lesson.inputs.batches
    school = School(batches, run, compute, lesson.classes, lesson.modules, seed)
    kept = None
    if checkpoint is not None:
        kept = checkpoint, identity_of(session, sites, technique, lesson.inputs, seed, fit)
    try:
        return train_blockwise(
            session.applier, sites, school, technique, _measure_of(session),
            fit=fit, watch=watch, heed=heed, checkpoint=kept,
        )  # fmt: skip
    except OUT_OF_MEMORY as error:
        raise out_of_memory(error) from error


def _measure_of(session: Session) -> Callable[[Sites], Held]:
    """Return what measures a recipe on the search split."""
    session.baseline("search")  # which is what it compares with

    def measure(candidate: Sites) -> Held:
        with session.without_reuse():
            measured, reading, _ = session.measure(candidate, "search")
        return Held(measured.loss, reading.metric.name, reading.value, reading.distance)

    return measure


def lesson_of(session: Session, seed: int = 0) -> Lesson:
    """Return what a session's model learns from."""
    task, evaluator, prepared = session.task, session.evaluator, session.prepared

    def run(model: nn.Module, inputs: Any) -> Any:
        with prepared.in_float32(), guarded(_failed, task.source, OUT_OF_MEMORY):
            return outputs_of(evaluator.run(model, inputs))

    augment = None
    if task.augment is not None:
        augment = functools.partial(_augmented, task.augment, task.source)
    loss = None
    if task.training_loss is not None:
        loss = functools.partial(_labels_loss, task.training_loss, task.source, session.device)
    pairs = training_pairs(task, session.splits)
    targets = () if loss is None else tuple(targets for _, targets in pairs)
    modules = {site.name: prepared.model.get_submodule(site.users[0][0]) for site in prepared.sites}
    return Lesson(
        Lessons(tuple(inputs for inputs, _ in pairs), targets),
        run,
        session.baseline("search").by_classes,
        evaluator.scorer,
        modules,
        augment,
        loss,
        seed,
    )


def _augmented(augment: Callable[[Any], Any], source: str, inputs: Any) -> Any:
    def failed(reason: str) -> TrialError:
        return TrialError(f"augment failed: {reason}")

    with guarded(failed, source, OUT_OF_MEMORY):
        return augment(inputs)


def _labels_loss(
    loss: Callable[[Any, Any], Tensor],
    source: str,
    device: torch.device,
    outputs: Any,
    targets: Any,
) -> Tensor:
    """Return the user's loss of one batch; TrialError where it is no number with a gradient."""

    def failed(reason: str) -> TrialError:
        return TrialError(f"training_loss failed: {reason}")

    with guarded(failed, source, OUT_OF_MEMORY):
        found = loss(outputs, to_device(targets, device))
    if not isinstance(found, Tensor):
        kind = type(found).__name__
        raise TrialError(f"training_loss returned a {kind}: expected a tensor with one number")
    if found.numel() != 1:
        shape = list(found.shape)
        raise TrialError(
            f"training_loss returned a tensor of shape {shape}: expected one number, such as a mean"
        )
    if not found.requires_grad:
        raise TrialError("training_loss has no gradient: compute it from the outputs, in torch")
    return found.reshape(())


def _failed(reason: str) -> TrialError:
    return TrialError(f"the model fails while it is trained: {reason}")


def identity_of(
    session: Session,
    sites: Sites,
    technique: Training,
    lessons: Lessons,
    seed: int,
    fit: Sequential | None = None,
) -> str:
    """Return what a checkpoint is of: the model, the recipe, the technique, the data, the task.

    The file of a task, as what its functions do to the data is known by their text alone.
    """
    found = hashlib.sha256()
    scales = {
        n: (s.activation.scale, s.activation.zero_point) for n, s in sites.items() if s.activation
    }
    known = [session.identity.sha256, choices_key(sites), technique.plain(), seed, scales]
    known.append(session.task.sha256)
    if fit is not None:
        known.append(fit.plain())
    found.update(json.dumps(known, sort_keys=True).encode())
    batches = lessons.batches
    if lessons.targets:
        batches = list(zip(batches, lessons.targets, strict=True))
    for digest in sample_digests(batches):
        found.update(digest)
    return found.hexdigest()
