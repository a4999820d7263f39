"""``autoquant apply``: a recipe and a float model become a quantized model, and a file."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autoquant.errors import SpecError, TrialError, UserError
from autoquant.export.pt2 import NotExportable, export_program, is_program, save_program
from autoquant.methods.applier import Applier
from autoquant.methods.learned import read_learned
from autoquant.models.data import make_splits
from autoquant.models.exported import move
from autoquant.models.files import LoadedModel, of_module
from autoquant.models.task import Task, run_forward
from autoquant.models.usercode import guarded, interruptible
from autoquant.nn.archive import SUFFIX, is_archive, save_archive
from autoquant.nn.convert import prepare
from autoquant.nn.intake import copied
from autoquant.nn.rest import check_float32
from autoquant.nn.transforms import transform_as
from autoquant.session.session import open_session
from autoquant.spec.needs import needs_of
from autoquant.spec.outputs import check_target
from autoquant.spec.recipe import FLOAT32, Recipe

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one call of a model, by position and by name."""

MOST_SHAPES = 8
"""Most shapes of inputs that an exported program is tried with."""


@dataclass(frozen=True)
class Written:
    """What was written: a ``.pt2``, or an archive and the reason why it is no ``.pt2``."""

    path: Path
    kind: str
    reason: str | None


def check_model(recipe: Recipe, loaded: LoadedModel, *, accept: bool) -> None:
    """Raise SpecError where ``recipe`` is for another model file, unless ``accept``."""
    known = recipe.model
    if known is not None and known.sha256 != loaded.sha256 and not accept:
        raise SpecError(
            f"the recipe is for {known.name} (sha256 {known.sha256[:12]}…), not for {loaded.name} "
            f"(sha256 {loaded.sha256[:12]}…); with --accept-changes it is applied all the same"
        )


def needs_data(recipe: Recipe) -> str | None:
    """Return why ``recipe`` can't be applied without the task, or None."""
    for name, site in recipe.sites.items():
        needs = sorted(need.value for need in needs_of(site.canonical()))
        if needs:
            return f"{name}: it needs the task's calibration data: {', '.join(needs)}"
    return None


def quantize(
    loaded: LoadedModel, recipe: Recipe, task: Task | None, device: torch.device | None = None
) -> tuple[nn.Module, Recipe]:
    """Return the quantized model, carrying packed integers, and its calibrated recipe.

    It is calibrated, and returned, on ``device``; None is where the float model is. Raises
    SpecError where the recipe does not fit, or needs a task that is not given.
    """
    device = device or device_of(loaded.module)
    if task is not None:
        session = open_session(loaded, task, device, recipe=recipe, baselines=())
        return _deployed(session.applier, recipe)
    reason = needs_data(recipe)
    if reason is not None:
        raise SpecError(f"{reason}; give --task or --data")
    prepared = prepare(move(loaded.module, device), folded=recipe.folded)
    if recipe.rest != FLOAT32:
        check_float32(prepared.model, recipe.rest)
        prepared = prepared.lowered(recipe.rest)
    transform_as(prepared, recipe.transforms)
    return _deployed(Applier(prepared, {}, read_learned(recipe)), recipe)


def _deployed(applier: Applier, recipe: Recipe) -> tuple[nn.Module, Recipe]:
    try:
        calibrated = applier.apply(recipe.sites)
        named = {name: calibrated[name] for name in recipe.sites}
        return applier.deploy(recipe.sites), recipe.with_sites(named)
    except TrialError as error:
        raise UserError(f"the recipe can't be applied: {error}") from error


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer; the CPU where it has none."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


@interruptible()
def apply(recipe: Recipe, model: nn.Module | LoadedModel, task: Task | None = None) -> nn.Module:
    """Return a quantized copy of ``model``, on its device; the model itself is left as it is.

    ``task`` is needed where the recipe has an activation without a scale, or learns.
    """
    if isinstance(model, nn.Module):
        mine = of_module(model)
    else:
        mine = replace(model, module=copied(model.module))
        mine.module.eval()
    return quantize(mine, recipe, task)[0]


def examples_of(task: Task) -> list[Any]:
    """Return batches of the task's inputs, one of each shape; [None] where it keeps its data."""
    splits = make_splits(task)
    shapes: dict[Any, Any] = {}
    for inputs in (*splits.calibrate, *(inputs for inputs, _ in splits.search)):
        shapes.setdefault(_shapes(inputs), inputs)
    return list(shapes.values())[:MOST_SHAPES] or [None]


def _shapes(tree: Any) -> Any:
    leaves, structure = pytree.tree_flatten(tree)
    return str(structure), *(tuple(getattr(leaf, "shape", ())) for leaf in leaves)


def check_output(path: Path, inputs: Mapping[str, str | Path | None] | None = None) -> None:
    """Raise UserError where a model can't be written to ``path`` without loss to the user.

    ``inputs`` are the files that are read; a model that `autoquant apply` wrote may be replaced.
    """
    check_target(path, is_archive if path.suffix == SUFFIX else is_program, inputs)


def write(module: nn.Module, recipe: Recipe, task: Task | None, path: Path) -> Written:
    """Write a quantized model to ``path``: a .pt2 where it can be one, else a safe archive.

    The archive goes beside, with its own suffix, and its reason is returned. Wherever ``module``
    was, it is moved to the CPU first: a program is loaded where it was exported. Raises UserError
    where a file is there that no such call wrote.
    """
    check_output(path)
    module, reason = move(module, torch.device("cpu")), None
    if path.suffix != SUFFIX:
        reason = _try_program(module, task, path)
        if reason is None:
            return Written(path, "pt2", None)
    target = path.with_suffix(SUFFIX)
    check_output(target)
    save_archive(module, recipe, target)
    return Written(target, "archive", reason)


def _try_program(module: nn.Module, task: Task | None, path: Path) -> str | None:
    """Write a .pt2 and return None, or return why it can't be one."""
    if task is None:
        return "without a task there is no example input to export it with; give --task or --data"
    calls = calls_of(module, task)
    if isinstance(calls, str):
        return calls
    try:
        save_program(export_program(module, *calls[0], calls[1:]), path)
    except NotExportable as error:
        return f"torch.export can't follow the model: {error}"
    return None


def calls_of(module: nn.Module, task: Task) -> list[Call] | str:
    """Return how the task calls the model, one call of each shape; or why it can't be exported.

    The task is watched: a .pt2 can only stand for the module's own call, so ``forward`` must make
    just one.
    """
    seen: dict[Any, Call] = {}
    count = 0

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if len(seen) < MOST_SHAPES:
            seen.setdefault(_shapes((args, kwargs)), (args, dict(kwargs)))

    what = "forward" if task.evaluate is None else "evaluate"

    def failed(reason: str) -> UserError:
        return UserError(f"{what} failed on the quantized model: {reason}")

    handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    try:
        with guarded(failed, task.source), torch.no_grad():
            if task.evaluate is not None:
                task.evaluate(module)
            else:
                for inputs in examples_of(task):
                    count = 0
                    run_forward(task, module, inputs)
                    if count > 1:
                        return f"the task calls the model {count} times for one batch"
    finally:
        handle.remove()
    return list(seen.values()) or "the task does not call the model itself, but parts of it"
