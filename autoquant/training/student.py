"""A prepared model while it is trained: student by its learners, teacher in float, in turns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace

import torch

from autoquant.methods.applier import Applier
from autoquant.methods.learned import LearnedWeight
from autoquant.nn.sites import Site
from autoquant.quant.gradients.format import GradientFormat
from autoquant.spec.recipe import SiteRecipe
from autoquant.spec.techniques import CORRECTIONS, UNCORRECTED, Estimator
from autoquant.training.learner import Learner

EstimatorOf = Callable[[Site], Estimator]


class Student:
    """The learners of one recipe: of every site whose weight is quantized, or those ``names``.

    ``gradients`` is the format of those by layers' outputs, None for float32.
    Sites whose weight stays in float keep what the recipe says of their activation.
    """

    def __init__(
        self,
        applier: Applier,
        sites: Mapping[str, SiteRecipe],
        estimator: EstimatorOf,
        gradients: GradientFormat | None = None,
        names: Collection[str] | None = None,
    ) -> None:
        self.applier = applier
        self.sites = applier.apply(sites)
        self.learners: dict[str, Learner] = {}
        for site in applier.prepared.sites:
            if names is not None and site.name not in names:
                continue
            recipe = self.sites[site.name]
            held = applier.held(site.name, recipe)
            if held is not None:
                slot = applier.prepared.slots[site.name]
                self.learners[site.name] = Learner(
                    slot, held, recipe.activation, estimator(site), gradients
                )

    def parameters(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yield (site, kind, tensor) of everything that is trained, in the order of the sites."""
        for name, learner in self.learners.items():
            for kind, parameter in learner.parameters.items():
                yield name, kind, parameter

    @contextlib.contextmanager
    def learning(self, generator: torch.Generator | None = None) -> Iterator[None]:
        """Have the model compute with the parameters as they are now, inside.

        ``generator`` is for estimators that draw. The model is left in float.
        """
        applier = self.applier
        others = {n: s for n, s in self.sites.items() if n not in self.learners}
        applier.apply(others)
        try:
            for learner in self.learners.values():
                learner.stand_in(generator)
            yield
        finally:
            self.rest()

    @contextlib.contextmanager
    def teaching(self) -> Iterator[None]:
        """Have the model in float inside, and without gradients."""
        self.applier.to_float()
        with torch.no_grad():
            yield

    def rest(self) -> None:
        """Leave the model in float."""
        for learner in self.learners.values():
            learner.rest()
        self.applier.to_float()

    def solution(self) -> tuple[dict[str, SiteRecipe], dict[str, LearnedWeight]]:
        """Return the recipe's sites with what is learned by now, and that by its digest."""
        done, learned = dict(self.sites), {}
        bias = CORRECTIONS.get("bias")()
        for name, learner in self.learners.items():
            weight, activation = learner.solution()
            learned[weight.digest] = weight
            done[name] = replace(
                done[name],
                activation=activation,
                correction=bias if learner.site.corrects else UNCORRECTED,
                learned=weight.digest,
            )
        return done, learned
