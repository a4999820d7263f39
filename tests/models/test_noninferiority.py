"""Verdicts on a drop: against SciPy, against the trinomial itself, and by simulation."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from autoquant.models import paired_proportions as paired
from autoquant.models.metrics import METRICS, FunctionMetric
from autoquant.models.noninferiority import differing, drop_interval, flips, judge, samples_needed
from autoquant.spec.verdict import FAIL, NOT_PROVEN, PASS

ACCURACY = METRICS.get("accuracy")


def classifier(hits):
    """Evidence of a classifier that is right where ``hits``."""
    hits = np.asarray(hits, dtype=bool)
    targets = torch.zeros(len(hits), dtype=torch.long)
    return ACCURACY.evidence([(torch.tensor(~hits).long(), targets)])


def pair(lost, gained, n):
    """Evidence of two classifiers of which ``lost`` samples only the first has right."""
    one, two = np.ones(n, dtype=bool), np.ones(n, dtype=bool)
    two[:lost] = False
    one[lost : lost + gained] = False
    return classifier(one), classifier(two)


def verdict(before, after, margin, metric=ACCURACY):
    found = drop_interval(before, after, metric, 0)
    measured = before.score() - after.score()
    measured = measured if metric.higher_is_better else -measured
    return judge(before, after, metric, margin, measured, found)


def probabilities(n, rate, drop, most):
    """P(lost = i, gained = j) for i, j up to ``most``: the trinomial."""
    lost, gained = (rate + drop) / 2, (rate - drop) / 2
    i = np.arange(most + 1)
    first = stats.binom.pmf(i, n, lost)[:, None]
    return first * np.stack([stats.binom.pmf(i, n - k, gained / (1 - lost)) for k in i])


@pytest.mark.parametrize("n", [100, 436, 1000])
def test_intervals_and_tests_are_right_as_often_as_they_say(n):
    """No simulation: the trinomial is summed over every outcome, for every true drop."""
    most = int(0.08 * n + 8 * math.sqrt(0.08 * n) + 12)
    grid = np.meshgrid(np.arange(most + 1), np.arange(most + 1), indexing="ij")
    low, high = paired.bounds_of(*grid, n)
    lower, upper = paired.bounds_of(*grid, n, paired.ONE_SIDED)
    for rate, drop in itertools.product((0.0, 0.005, 0.02, 0.08), (0.0, 0.005, 0.01)):
        if drop > rate:
            continue
        p = probabilities(n, rate, drop, most)
        assert p.sum() == pytest.approx(1, abs=1e-6)
        assert p[(low <= drop) & (drop <= high)].sum() >= 0.95
        # At the margin itself neither PASS nor FAIL is right more than one time in twenty.
        assert p[upper < drop].sum() <= 0.05
        assert p[lower > drop].sum() <= 0.05


@pytest.mark.parametrize("z", [paired.ONE_SIDED, paired.TWO_SIDED])
def test_the_bounds_are_where_the_score_test_turns(z):
    """The nuisance by brute force: the flip rate that makes (b, c) likeliest under a drop."""
    b, c, n = 9, 4, 120
    q = np.linspace(1e-6, 0.3, 300_001)
    for end, sign in zip(paired.bounds(b, c, n, z), (-1, 1), strict=True):
        lost, gained = q + max(end, 0), q + max(-end, 0)
        other = 1 - lost - gained
        likelihood = b * np.log(lost) + c * np.log(gained) + (n - b - c) * np.log(other)
        best = int(likelihood.argmax())
        variance = n * (lost[best] + gained[best] - end**2)
        excess = sign * (n * end - (b - c)) - paired.CONTINUITY
        assert excess / math.sqrt(variance) == pytest.approx(z, rel=1e-4)


@pytest.mark.parametrize(
    ("lost", "gained"), [(0, 0), (1, 0), (0, 4), (0, 5), (5, 0), (4, 0), (30, 12), (12, 30)]
)
def test_a_margin_of_zero_is_mcnemars_exact_test(lost, gained):
    found = verdict(*pair(lost, gained, 200), 0.0)
    better = worse = 1.0
    if lost + gained:
        better = stats.binomtest(lost, lost + gained, 0.5, alternative="less").pvalue
        worse = stats.binomtest(lost, lost + gained, 0.5, alternative="greater").pvalue
    assert paired.mcnemar(lost, gained) == pytest.approx((better, worse))
    expected = PASS if better <= 0.05 else FAIL if worse <= 0.05 else NOT_PROVEN
    assert found.outcome == expected


def test_the_three_outcomes():
    found = verdict(*pair(8, 6, 436), 0.01)
    assert found.outcome == NOT_PROVEN
    assert found.drop == pytest.approx(2 / 436)
    assert found.flip_rate == pytest.approx(14 / 436)
    assert found.interval[0] < 0 < 0.01 < found.interval[1]
    needed = (1.645 + 0.8416) ** 2 * (14 / 436 - (2 / 436) ** 2) / (0.01 - 2 / 436) ** 2
    assert found.samples == 436 < found.samples_needed == pytest.approx(needed, rel=1e-3)
    assert verdict(*pair(80, 60, 20_000), 0.01).outcome == PASS
    assert verdict(*pair(40, 3, 436), 0.01).outcome == FAIL
    assert verdict(*pair(40, 3, 436), 0.01).samples_needed is None


def test_as_many_samples_as_are_needed_prove_it_four_times_in_five():
    n = samples_needed(0.03 - 0.002**2, 0.01, 0.002, bounded=True)
    rng = np.random.default_rng(0)
    lost, gained, _ = rng.multinomial(n, [0.016, 0.014, 0.97], 4000).T
    upper = paired.bounds_of(lost, gained, n, paired.ONE_SIDED)[1]
    assert 0.77 <= (upper <= 0.01).mean() <= 0.83


def test_no_flips_are_no_certainty():
    few, many = (verdict(*pair(0, 0, n), 0.01) for n in (100, 400))
    assert (few.outcome, many.outcome) == (NOT_PROVEN, PASS)
    assert few.flip_rate == 0
    assert few.interval[0] < -0.03 < 0.03 < few.interval[1]
    # What it says is needed is what passes, and one less does not.
    needed = few.samples_needed
    assert verdict(*pair(0, 0, needed), 0.01).outcome == PASS
    assert verdict(*pair(0, 0, needed - 1), 0.01).outcome == NOT_PROVEN


def test_all_flips():
    worse, better = verdict(*pair(50, 0, 50), 0.01), verdict(*pair(0, 50, 50), 0.01)
    assert (worse.outcome, worse.drop, worse.flip_rate) == (FAIL, 1, 1)
    assert (better.outcome, better.drop) == (PASS, -1)
    assert 0.8 < worse.interval[0] < 1 == worse.interval[1]
    assert better.interval == (-worse.interval[1], -worse.interval[0])
    both = verdict(*pair(25, 25, 50), 0.01)
    assert both.outcome == NOT_PROVEN
    assert both.samples_needed > 50_000


def test_one_sample_and_none_prove_nothing():
    found = verdict(*pair(0, 0, 1), 0.01)
    assert (found.outcome, found.interval, found.samples_needed) == (NOT_PROVEN, None, None)
    bare = judge(None, None, ACCURACY, 0.01, 0.0, drop_interval(*pair(0, 0, 2), ACCURACY))
    assert (bare.outcome, bare.interval, bare.samples) == (NOT_PROVEN, None, 0)


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_a_metric_that_never_varies_proves_nothing(value):
    metric = FunctionMetric(lambda o, t: value, True)
    one, two = (metric.evidence([(torch.randn(40, 2), torch.zeros(40))]) for _ in range(2))
    found = judge(one, two, metric, 0.01, 0.0, drop_interval(one, two, metric))
    assert (found.outcome, found.interval, found.flip_rate) == (NOT_PROVEN, None, None)


def test_samples_that_do_not_count_are_left_out_and_positions_are_no_samples():
    logits = torch.eye(2)[[0, 1, 0, 1]]
    targets = torch.tensor([0, 0, -100, 1])
    one = ACCURACY.evidence([(logits, targets)])
    two = ACCURACY.evidence([(1 - logits, targets)])
    assert flips(one, two, ACCURACY) == (2, 1, 3)
    tokens = ACCURACY.evidence([(torch.zeros(2, 3, 2), torch.tensor([[0, 1, 1]] * 2))])
    assert flips(tokens, tokens, ACCURACY) is None
    with pytest.raises(ValueError, match="not paired"):
        flips(one, tokens, ACCURACY)


def sentences(errors, words=8):
    """Evidence of token error rate with so many wrong tokens in each sentence."""
    metric = METRICS.get("token_error_rate")
    right = ["a"] * words
    outputs = [["b"] * int(k) + ["a"] * (words - int(k)) for k in errors]
    return metric.evidence([(outputs, [right] * len(outputs))])


def test_few_samples_that_differ_widen_the_bootstrap():
    """Two sentences in a hundred change: plain percentiles hold the truth in 3 of 4 cases."""
    metric = METRICS.get("token_error_rate")
    rng = np.random.default_rng(0)
    n, rate, truth, covered = 100, 0.02, 0.02 / 8, 0
    runs = 150
    before = sentences(np.ones(n))
    for _ in range(runs):
        change = (rng.random(n) < rate) * rng.choice([-1, 1, 3], n)
        found = drop_interval(before, sentences(1 + change), metric, 0)
        covered += found.low <= truth <= found.high
        if not change.any():
            assert found.low == -found.high < 0
    assert covered / runs >= 0.9


@pytest.mark.parametrize("n", [15, 40])
def test_few_samples_of_a_continuous_metric_are_covered(n):
    metric = METRICS.get("mae")
    rng = np.random.default_rng(1)
    truth, covered, runs = 0.1 * math.sqrt(2 / math.pi), 0, 200
    zeros = torch.zeros(n)
    for seed in range(runs):
        x = torch.tensor(rng.normal(size=n))
        one, two = (metric.evidence([(k * x, zeros)]) for k in (1.0, 1.1))
        assert differing(one, two) == n
        found = drop_interval(one, two, metric, seed)
        covered += found.low <= truth <= found.high
    assert covered / runs >= 0.9


def test_other_metrics_are_judged_by_the_bootstrap():
    metric = METRICS.get("mae")
    x = torch.tensor(np.random.default_rng(2).normal(size=400))
    one, two = (metric.evidence([(k * x, torch.zeros(400))]) for k in (1.0, 1.1))
    assert [verdict(one, two, m, metric).outcome for m in (0.2, 0.08, 0.01)] == [
        PASS,
        NOT_PROVEN,
        FAIL,
    ]
    found = verdict(one, two, 0.0805, metric)
    assert found.flip_rate is None
    assert found.samples == 400
    assert found.samples_needed is None or found.samples_needed > 400


@pytest.mark.parametrize(
    ("variance", "margin", "drop"),
    [(math.nan, 0.01, 0.0), (0.1, 0.01, math.nan), (0.1, 0.01, 0.01), (0.1, 0.0, 0.0)],
)
def test_where_no_number_of_samples_would_do(variance, margin, drop):
    assert samples_needed(variance, margin, drop, bounded=True) is None
