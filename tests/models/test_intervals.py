import math
import time

import numpy as np
import pytest
import torch
from scipy import stats

from autoquant.models.intervals import Interval, paired_bootstrap
from autoquant.models.metrics import METRICS, FunctionMetric

ACCURACY = METRICS.get("accuracy")


def evidence(hits: np.ndarray):
    """Evidence of a classifier that is right where ``hits``."""
    targets = torch.zeros(len(hits), dtype=torch.long)
    return ACCURACY.evidence([(torch.tensor(~hits).long(), targets)])


def test_standard_error_of_a_paired_accuracy_difference():
    # b samples only the float model has right, c only the quantized one: SE² = (d − Δ²)/n.
    n, b, c = 1000, 30, 10
    hits = np.ones(n, dtype=bool)
    quantized = hits.copy()
    quantized[:b] = False
    hits[b : b + c] = False
    interval = paired_bootstrap(evidence(hits), evidence(quantized), ACCURACY, seed=0)
    difference, flips = (b - c) / n, (b + c) / n
    expected = math.sqrt((flips - difference**2) / n)
    assert interval.standard_error == pytest.approx(expected, rel=0.08)
    assert interval.low < difference < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * expected, rel=0.12)


def test_the_interval_covers_the_true_drop_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        x = rng.normal(size=(150, 2))
        # Errors of a float and a quantized model, correlated; the true drop in MAE is 0.1·√(2/π).
        f = torch.tensor(x[:, 0])
        q = torch.tensor(1.1 * x[:, 0])
        metric = METRICS.get("mae")
        zeros = torch.zeros(150)
        interval = paired_bootstrap(
            metric.evidence([(f, zeros)]), metric.evidence([(q, zeros)]), metric, 500, trial
        )
        covered += interval.low <= 0.1 * math.sqrt(2 / math.pi) <= interval.high
    assert stats.binomtest(covered, 300, 0.95).pvalue > 0.001
    assert covered >= 270


def test_the_same_samples_are_drawn_for_both_models():
    rng = np.random.default_rng(0)
    hits = rng.random(500) < 0.7
    interval = paired_bootstrap(evidence(hits), evidence(hits), ACCURACY)
    assert interval == Interval(0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("name", ["accuracy", "f1", "mae", "pearson", "spearman"])
def test_equal_seeds_give_equal_intervals_and_the_drop_lies_inside(name):
    metric = METRICS.get(name)
    g = torch.Generator().manual_seed(0)
    if name in ("accuracy", "f1"):
        y = torch.randint(3, (200,), generator=g)
        f = torch.nn.functional.one_hot(y, 3) + 0.3 * torch.randn(200, 3, generator=g)
        q = f + 0.3 * torch.randn(200, 3, generator=g)
    else:
        y = torch.randn(200, generator=g)
        f = y + torch.randn(200, generator=g)
        q = f + torch.randn(200, generator=g)
    a, b = metric.evidence([(f, y)]), metric.evidence([(q, y)])
    one, two = (paired_bootstrap(a, b, metric, 300, seed=7) for _ in range(2))
    assert one == two
    assert one != paired_bootstrap(a, b, metric, 300, seed=8)
    worse = (a.score() - b.score()) * (1 if metric.higher_is_better else -1)
    assert one.low < worse < one.high
    assert worse > 0


def test_a_function_agrees_with_the_same_metric_by_name():
    g = torch.Generator().manual_seed(0)
    y, f = torch.randn(100, generator=g), torch.randn(100, generator=g)
    q = f + 0.5 * torch.randn(100, generator=g)
    own = FunctionMetric(lambda o, t: (o - t).abs().mean(), higher_is_better=False)
    named = METRICS.get("mae")
    args = [m.evidence([(x, y)]) for m in (own, named) for x in (f, q)]
    mine = paired_bootstrap(args[0], args[1], own, 200, seed=1)
    theirs = paired_bootstrap(args[2], args[3], named, 200, seed=1)
    assert mine.low == pytest.approx(theirs.low, abs=1e-6)
    assert mine.standard_error == pytest.approx(theirs.standard_error, abs=1e-6)


def test_too_little_to_know():
    one = evidence(np.array([True]))
    assert not paired_bootstrap(one, one, ACCURACY).known
    undefined = FunctionMetric(lambda o, t: math.nan, True).evidence([(torch.zeros(5),) * 2])
    assert not paired_bootstrap(undefined, undefined, ACCURACY).known
    with pytest.raises(ValueError, match="not paired"):
        paired_bootstrap(one, evidence(np.array([True, True])), ACCURACY)


def test_a_thousand_samples_take_milliseconds():
    hits = np.random.default_rng(0).random(1000) < 0.8
    a, b = evidence(hits), evidence(~hits)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        paired_bootstrap(a, b, ACCURACY)
        best = min(best, time.perf_counter() - start)
    assert best < 0.5
