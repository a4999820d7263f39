"""What gains no more on held-back data than chance would give is not taken for better."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from autoquant.measure.divergence import Distance
from autoquant.models.metrics import METRICS
from autoquant.session.training import lesson_of
from autoquant.training.held import AS_IT_WAS, BY_CHANCE, LUCK, Held, Sites
from autoquant.training.train import train
from tests.training.models import W3A8, everywhere, opened
from tests.training.test_train import SHORT


def held(outputs: Tensor, teacher: Tensor, name: str = "kl") -> Held:
    metric = METRICS.get(name)
    evidence = metric.evidence([(outputs, teacher)])
    return Held(evidence.score(), distance=Distance(metric, evidence))


def noisy(teacher: Tensor, size: float, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return teacher + size * torch.randn(teacher.shape, generator=draw)


@pytest.mark.parametrize("name", ["kl", "noise_to_signal"])
@pytest.mark.parametrize("samples", [12, 60, 300])
def test_less_noise_is_clearly_less_and_other_noise_seldom(samples: int, name: str) -> None:
    teacher = torch.randn(samples, 10, generator=torch.Generator().manual_seed(0))
    start = held(noisy(teacher, 0.5, 1), teacher, name)
    assert held(noisy(teacher, 0.2, 2), teacher, name).clearly_less_than(start)
    assert not start.clearly_less_than(start)
    found = []
    for seed in range(200):
        one, two = (held(noisy(teacher, 0.5, s), teacher, name) for s in (seed, seed + 1000))
        found.append((one.loss < two.loss, one.clearly_less_than(two)))
    less, clearly = (sum(column) for column in zip(*found, strict=True))
    assert 70 < less < 130
    assert 45 < clearly < 105  # 74 in the long run


def test_it_decides_as_the_paired_test_of_student_does() -> None:
    teacher = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    start = held(noisy(teacher, 0.5, 1), teacher)
    assert start.distance is not None
    kl = METRICS.get("kl")
    before = kl.per_sample_loss(start.distance.evidence)
    agreed = []
    for seed, size in enumerate(np.linspace(0.47, 0.52, 40), start=2):
        other = held(noisy(teacher, float(size), seed), teacher)
        assert other.distance is not None
        after = kl.per_sample_loss(other.distance.evidence)
        sure = stats.ttest_rel(after, before, alternative="less").pvalue < stats.norm.sf(LUCK)
        agreed.append(other.clearly_less_than(start) == sure)
    assert sum(agreed) >= 38


def test_losses_decide_where_samples_are_not_known() -> None:
    assert Held(0.5).clearly_less_than(Held(1.0))
    assert not Held(1.0).clearly_less_than(Held(1.0))
    assert not Held(math.inf).clearly_less_than(Held(1.0))
    assert Held(0.5).clearly_less_than(Held(math.inf))
    one = torch.randn(1, 10)
    assert held(noisy(one, 0.1, 0), one).clearly_less_than(held(noisy(one, 9.0, 0), one))


@pytest.mark.parametrize("sure", [False, True])
def test_training_that_gains_by_chance_leaves_the_recipe_as_it_was(sure: bool) -> None:
    """Half of the samples are better and half are worse, a little less so, or all are better."""
    session = opened()
    start = everywhere(session, W3A8)
    asked: list[float] = []

    def measure(sites: Sites) -> Held:
        losses = np.ones(100)
        if sites != start:
            losses -= 0.5 if sure else np.where(np.arange(100) % 2, 0.51, -0.49)
        asked.append(losses.mean())
        evidence = METRICS.get("kl").of_statistics([np.stack([losses, np.ones(100)], 1)])
        return Held(evidence.score(), distance=Distance(METRICS.get("kl"), evidence))

    technique = replace(SHORT, steps=10)
    found = train(session.applier, start, lesson_of(session), technique, measure)
    assert found.before == 1.0
    assert min(asked) == pytest.approx(0.5 if sure else 0.99)
    assert bool(found.learned) == sure
    assert (found.sites == start) == (not sure)
    assert found.after == pytest.approx(0.5 if sure else 1.0)
    said = [(f.what, f.done) for f in found.findings]
    assert said == ([] if sure else [(BY_CHANCE, AS_IT_WAS)])
