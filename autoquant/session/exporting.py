"""``autoquant export --to``: a recipe becomes a file of another runtime, and is measured there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.errors import TrialError, UserError
from autoquant.export.exporter import EXPORTERS, Example, Exporter, check_installed, difference
from autoquant.export.pt2 import NotExportable
from autoquant.measure.timing import clock_of, median_seconds
from autoquant.models.files import LoadedModel
from autoquant.models.task import Task
from autoquant.nn.intake import copied
from autoquant.session.apply import calls_of
from autoquant.session.session import open_session
from autoquant.spec.outputs import check_target
from autoquant.spec.recipe import Recipe

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Exported:
    """What was written, and what it is in its runtime.

    - ``metric`` of the float model, of the recipe by the reference, and of the file by the
      ``runtime``, on the ``samples`` of ``split``.
    - ``difference``: the root of noise over signal of the file's outputs beside the recipe's, on
      one batch: integers that lie between two round as the runtime's sums of numbers say.
    - ``integers``: products that the runtime computes in integers, and all of them.
    - ``float_ms`` and ``ms``: milliseconds of the float model, written the same way, and of the
      file, for one call of ``batch`` samples on so many ``threads``.
    """

    path: Path
    runtime: str
    metric: str
    split: str
    samples: int
    baseline: float
    reference: float
    value: float
    difference: float
    integers: tuple[int, int] | None
    float_ms: float
    ms: float
    threads: int
    size_bytes: int

    @property
    def speedup(self) -> float:
        """How many times faster than the float model in the same runtime."""
        return self.float_ms / self.ms

    def plain(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {
            "path": str(self.path),
            "runtime": self.runtime,
            "metric": self.metric,
            "split": self.split,
            "samples": self.samples,
            "float": self.baseline,
            "recipe": self.reference,
            "exported": self.value,
            "difference": self.difference,
            "integer_products": None if self.integers is None else list(self.integers),
            "float_ms": self.float_ms,
            "ms": self.ms,
            "speedup": self.speedup,
            "threads": self.threads,
            "size_bytes": self.size_bytes,
        }


def check_export(
    kind: str, path: Path, inputs: Mapping[str, str | Path | None] | None = None
) -> Exporter:
    """Return the exporter of a kind of files; UserError where it can't write to ``path``.

    Where its libraries are missing, the name says another kind, or a file is there that no export
    wrote.
    """
    exporter = EXPORTERS.get(kind)
    check_installed(kind, exporter)
    if path.suffix != exporter.suffix:
        raise UserError(f"{path}: what --to {kind} writes ends in {exporter.suffix}")
    check_target(path, exporter.ours, inputs)
    return exporter


def export(
    loaded: LoadedModel,
    task: Task,
    recipe: Recipe,
    kind: str,
    path: Path,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write the quantized model to ``path`` and measure the file in its runtime.

    Raises UserError where the recipe has what the kind of file can't express, where the model's
    code can't be followed, or the user's code fails.
    """
    exporter = check_export(kind, path)
    plain = copied(loaded.module)
    session = open_session(loaded, task, CPU, recipe=recipe, say=say)
    split = "confirm" if session.evaluator.confirms else "search"
    try:
        base = session.baseline(split)
        with session.prepared.engine.reference(), session.without_reuse():
            _, reference, done = session.measure(recipe.sites, split)
        module = session.applier.deploy({name: done[name] for name in recipe.sites})
    except TrialError as error:
        raise UserError(f"{task.source}: {error}") from error
    reasons = exporter.unfit(module)
    if reasons:
        more = f", and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        raise UserError(f"the recipe can't be written as {kind}: {'; '.join(reasons[:3])}{more}")
    example = _example(module, task, kind)
    say(f"writing {path}")
    try:
        exporter.write(module, example, path)
    except NotExportable as error:
        raise UserError(f"the model can't be written as {kind}: {error}") from error
    threads = torch.get_num_threads()
    say(f"measuring in {exporter.runtime}")
    runtime = exporter.open(path, example, threads)
    try:
        found = session.evaluator.read(runtime, split)
    except TrialError as error:
        raise UserError(f"{path}: in {exporter.runtime}: {error}") from error
    args, kwargs = example.call
    with tempfile.TemporaryDirectory() as folder:
        name = Path(folder) / f"float{exporter.suffix}"
        exporter.write(plain, example, name)
        float_ms = _milliseconds(exporter.open(name, example, threads), example)
    return Exported(
        path, exporter.runtime, found.metric.name, split, found.samples, base.value,
        reference.value, found.value, difference(example.output, runtime(*args, **kwargs)),
        runtime.integers, float_ms, _milliseconds(runtime, example), threads, _size(path),
    )  # fmt: skip


def _example(module: nn.Module, task: Task, kind: str) -> Example:
    """Return how the task calls the model; UserError where that is no one call."""
    calls = calls_of(module, task)
    if isinstance(calls, str):
        raise UserError(f"the model can't be written as {kind}: {calls}")
    return Example.of(module, calls[0])


def _milliseconds(runtime: nn.Module, example: Example) -> float:
    """Return the median time of one call."""
    args, kwargs = example.call
    return 1e3 * median_seconds(lambda: runtime(*args, **kwargs), clock_of(CPU), budget=1.0)


def _size(path: Path) -> int:
    """Return the bytes of a file, and of the one beside it that holds the weights, if any."""
    beside = path.with_suffix(".bin")
    files = [path, *([beside] if path.suffix == ".xml" else [])]
    return sum(file.stat().st_size for file in files)
