"""Batch by batch a metric says what it says of all batches at once."""

from __future__ import annotations

import pytest
import torch

from autoquant.measure.scored import FEWEST_TO_STOP, Scored
from autoquant.models.metrics import METRICS, FunctionMetric

SAMPLES = 96


def batches(seed, size=16):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, 4, generator=draw)
    y = torch.randint(0, 4, (SAMPLES,), generator=draw)
    return list(zip(x.split(size), y.split(size), strict=True))


def right(outputs, targets):
    return float((outputs.argmax(1) == targets).float().mean())


def scored_of(metric, pairs, kept=()):
    found = Scored(metric, kept)
    for outputs, targets in pairs:
        found.add(outputs, targets)
    return found


@pytest.mark.parametrize(
    "metric", [METRICS.get("accuracy"), METRICS.get("perplexity"), FunctionMetric(right, True)]
)
def test_the_evidence_is_that_of_all_batches(metric):
    pairs = batches(0)
    assert scored_of(metric, pairs).evidence().score() == metric.evidence(pairs).score()


def test_outputs_are_held_as_long_as_there_are_some_to_compare_with():
    pairs = batches(0)
    kept = [outputs for outputs, _ in pairs[:2]]
    held = scored_of(METRICS.get("accuracy"), pairs, kept).outputs
    assert [outputs is not None for outputs in held] == [True] * 2 + [False] * 4
    # A function of all samples needs them all.
    assert None not in scored_of(FunctionMetric(right, True), pairs, kept).outputs


def test_what_was_kept_stands_for_the_targets_of_a_metric_that_compares():
    pairs, floats = batches(0), [outputs for outputs, _ in batches(1)]
    metric = METRICS.get("kl")
    expected = metric.evidence([(o, f) for (o, _), f in zip(pairs, floats, strict=True)])
    assert scored_of(metric, pairs, floats).evidence().score() == expected.score() > 0


def test_hopeless_is_only_what_is_surely_worse_than_a_rival():
    metric = METRICS.get("accuracy")
    targets = torch.zeros(SAMPLES, dtype=torch.long)
    perfect = torch.eye(4)[targets]
    rival = metric.evidence([(perfect, targets)])
    wrong = perfect.flip(1)
    assert scored_of(metric, [(wrong, targets)]).hopeless(0.01, rival)
    assert not scored_of(metric, [(wrong, targets)]).hopeless(1.0, rival)
    assert not scored_of(metric, [(wrong, targets)]).hopeless(0.01, None)
    assert not scored_of(metric, [(perfect, targets)]).hopeless(0.01, rival)
    few = FEWEST_TO_STOP - 1
    assert not scored_of(metric, [(wrong[:few], targets[:few])]).hopeless(0.01, rival)
    assert not scored_of(METRICS.get("perplexity"), [(wrong, targets)]).hopeless(0.01, rival)
