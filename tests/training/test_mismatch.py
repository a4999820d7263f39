"""What is said of gradients: nothing is wrong where the grid is fine, much where it is coarse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.techniques import ESTIMATORS, Estimator
from autoquant.training.mismatch import Mismatch, mismatch, smooth_gradients
from autoquant.training.probes import slopes
from tests.training.models import KINDS, opened
from tests.training.test_probes import FINE, noised, pupil_of

COARSE = SiteRecipe(WeightScheme(2), ActivationScheme(2))


@dataclass(frozen=True)
class Opposite(Estimator):
    """The wrong way."""

    method: ClassVar[str] = "opposite"

    def position(
        self, g: Tensor, r: Tensor, q: Tensor, lo: Tensor | float, hi: Tensor | float
    ) -> Tensor:
        return -g * ((r > lo) & (r < hi))


def found_of(
    recipe: SiteRecipe, kind: str = "mlp", name: str = "lsq", noise: float = 8.0
) -> dict[str, Mismatch]:
    pupil = pupil_of(opened(kind), recipe)
    noised(pupil, noise)
    estimator = Opposite() if name == "opposite" else ESTIMATORS.get(name)()
    return mismatch(pupil, estimator, smooth_gradients(pupil), slopes(pupil, 12), step=1.0)


def test_on_a_fine_grid_gradients_agree_and_bring_what_they_promise() -> None:
    for name, found in found_of(FINE).items():
        assert found.smooth.cosine > 0.9, name
        assert found.smooth.signs > 0.9, name
        assert found.descent == pytest.approx(1.0, abs=0.25), name
        assert found.check.correlation > 0.5, name


def test_on_a_coarse_one_they_do_not() -> None:
    fine, coarse = found_of(FINE), found_of(COARSE, noise=0.3)
    for name in fine:
        assert coarse[name].smooth.cosine < fine[name].smooth.cosine, name


def test_the_wrong_way_is_seen() -> None:
    # Of the last layer alone: one quantizer of a weight and one of its inputs, which has no part.
    *_, found = found_of(FINE, name="opposite").values()
    assert found.smooth.cosine < -0.9
    assert found.descent == pytest.approx(-1.0, abs=0.25)
    assert found.check.correlation < -0.5


def test_of_an_estimator_that_draws_the_noise_is_told() -> None:
    for found in found_of(COARSE, name="stochastic", noise=0.3).values():
        assert found.smooth.noise > 0
        assert found.smooth.bias >= 0
    for found in found_of(COARSE, noise=0.3).values():
        assert math.isnan(found.smooth.noise)


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_layers_have_it(kind: str) -> None:
    pupil = pupil_of(opened(kind), COARSE)
    own = [learner.estimator for learner in pupil.student.learners.values()]
    before = [p.detach().clone() for _, _, p in pupil.student.parameters()]
    smooth = smooth_gradients(pupil)
    found = mismatch(pupil, ESTIMATORS.get("ewgs")(), smooth, slopes(pupil, 3))
    assert set(found) == set(pupil.student.learners)
    assert all(-1 <= m.smooth.cosine <= 1 for m in found.values())
    assert own == [learner.estimator for learner in pupil.student.learners.values()]
    after = [p.detach() for _, _, p in pupil.student.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
