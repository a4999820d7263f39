"""One block's turn: its samples are gathered, its layers are fitted to them, and trained."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autoquant.errors import TrialError
from autoquant.methods.applier import Applier
from autoquant.methods.reconstruct import reconstruct
from autoquant.methods.reconstruction.blockwise import Blockwise
from autoquant.methods.reconstruction.sequential import Sequential
from autoquant.spec.recipe import SiteRecipe
from autoquant.training.blocks import Block, Run, floating
from autoquant.training.guard import Finding
from autoquant.training.held import Held, Measure, Sites
from autoquant.training.objective import Seen, distance
from autoquant.training.samples import Call, Compute, Gathered, gather, mixed
from autoquant.training.student import Student
from autoquant.training.train import train
from autoquant.training.trainer import Lesson


@dataclass(frozen=True)
class BlockDone:
    """One block that has been trained, the ``number``-th of ``count``.

    ``before`` is the noise over the signal of its outputs on samples that were held back (of the
    last block it may be the divergence), ``fitted`` that after its layers were fitted anew, if any
    can be, and ``after`` at the best of both and of training; ``kept`` of ``samples`` had room in
    memory. ``findings`` are what went wrong, and what was done about it.
    """

    path: str
    number: int
    count: int
    before: float
    fitted: float
    after: float
    kept: int
    samples: int
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, eq=False)
class BlockLesson(Lesson):
    """What one block is given: its inputs and the float block's outputs are at hand."""

    def taught(self, student: Student, inputs: Call, features: Mapping[str, nn.Module]) -> Seen:
        """Return what the float block gave."""
        return Seen(outputs=inputs.targets)


@dataclass(frozen=True, eq=False)
class School:
    """What all blocks have in common.

    ``run`` is the user's forward on a batch, ``compute`` calls one module; ``classes`` says that
    the model's outputs are scores of classes; ``modules`` are those that own sites, by name.
    """

    batches: Sequence[Any]
    run: Run
    compute: Compute
    classes: bool
    modules: Mapping[str, nn.Module]
    seed: int = 0


def measured(measure: Measure, sites: Sites) -> Held:
    """Return what a recipe comes to, with an infinite loss where it has none."""
    try:
        found = measure(sites)
    except TrialError:  # outputs that are not finite, say: as bad as can be
        return Held(math.inf)
    return found if math.isfinite(found.loss) else Held(math.inf)


class Turn:
    """One block's turn: gather its samples, fit its layers, train them."""

    def __init__(
        self,
        applier: Applier,
        school: School,
        block: Block,
        technique: Blockwise,
        fit: Sequential,
    ) -> None:
        self._applier, self._school, self._block = applier, school, block
        self._technique, self._fit = technique, fit
        self._module = applier.prepared.model.get_submodule(block.path)
        self._classes = block.head and school.classes

    def __call__(
        self, sites: dict[str, SiteRecipe], heed: Callable[[int], None]
    ) -> tuple[dict[str, SiteRecipe], BlockDone]:
        """Return all sites with those of the block as they are best, and how that came about."""
        applier, school, block = self._applier, self._school, self._block
        heed(0)
        samples = gather(
            applier.prepared.model, block, school.batches, school.run, school.compute,
            applier.to_float, lambda: applier.apply(sites),
        )  # fmt: skip
        measure = functools.partial(self._loss, samples)
        before = measured(measure, sites).loss
        start = self._fitted(samples, sites)
        fitted = measured(measure, start).loss if start != sites else before
        if not fitted < before:
            start = sites
        drop = self._technique.drop
        lesson = BlockLesson(
            samples.learn,
            lambda _, call: self._run(call),
            self._classes,
            modules={name: school.modules[name] for name in block.sites},
            augment=functools.partial(mixed, drop) if drop else None,
            seed=school.seed,
        )
        found = train(
            applier, start, lesson, self._technique, measure, names=block.sites, heed=heed
        )
        done = BlockDone(
            block.path, 0, 0, before, fitted, found.after, samples.kept, samples.samples,
            self._said(found.findings, samples),
        )  # fmt: skip
        return applier.apply(found.sites), done

    def _run(self, call: Call) -> Any:
        args, kwargs = call.inputs
        return tuple(floating(self._school.compute(self._module, args, kwargs)))

    def _loss(self, samples: Gathered, sites: Sites) -> Held:
        """Return the loss of the block on the samples that are held back, with sites as given."""
        self._applier.apply(sites)
        held, total = samples.held, 0.0
        for call in held.batches:
            for part in torch.arange(call.size, dtype=torch.int64).split(self._technique.batch):
                own = call.rows(part.tolist()) if held.divisible else call.copied()
                with torch.no_grad():
                    pairs = list(zip(self._run(own), own.targets, strict=False))
                    pairs = [(x, y) for x, y in pairs if x.shape == y.shape]
                    loss = distance(pairs, self._classes)
                if loss is None:
                    raise TrialError("its outputs have other shapes when it is quantized")
                total += float(loss) * own.size
        return Held(total / held.count)

    def _fitted(self, samples: Gathered, sites: dict[str, SiteRecipe]) -> dict[str, SiteRecipe]:
        """Return sites with the layers of the block fitted to X̂, one after another."""
        calls = samples.learn.batches
        return reconstruct(
            self._applier,
            sites,
            calls,
            lambda _, call: self._run(call.copied()),
            self._fit,
            names=self._block.sites,
            clean_batches=[replace(call, inputs=call.clean) for call in calls],
        )

    def _said(self, findings: Sequence[Finding], samples: Gathered) -> tuple[Finding, ...]:
        path = self._block.path
        said = [f if f.layer else replace(f, layer=path) for f in findings]
        if samples.kept < samples.samples:
            what = f"{samples.samples} samples of it don't fit the memory"
            said.append(Finding(0, path, what, f"learned from {samples.kept} of them"))
        return tuple(said)
