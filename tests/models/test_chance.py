"""Chance levels, against the metric itself on the constant answer that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from autoquant.models.chance import chance_level
from autoquant.models.metrics import METRICS

LABELS = torch.tensor([0, 3, 3, 1, 3, 5, 3, 6, 2, 1, 4, 6, 7])
NUMBERS = torch.tensor([0.5, 2.0, -1.0, 8.0, 0.25])


def score(name, outputs, targets):
    return METRICS.get(name).evidence([(outputs, targets)]).score()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_classes(dtype):
    y = LABELS.to(dtype)
    always = F.one_hot(torch.full((len(y),), 3), 8).float()
    for name in ("accuracy", "f1"):
        found = chance_level(name, list(y.split(5)))
        assert found.value == pytest.approx(score(name, always, y))
    five = torch.zeros(len(y), 8)
    five[:, [3, 1, 6, 0, 2]] = 1.0
    assert chance_level("top5", [y]).value == pytest.approx(score("top5", five, y))


def test_two_classes_and_positions_that_do_not_count():
    y = torch.tensor([1, 0, 1, 1, -100, 0])
    ones = torch.tensor([[0.0, 1.0]]).repeat(len(y), 1)
    for name in ("accuracy", "f1"):
        assert chance_level(name, [y]).value == pytest.approx(score(name, ones, y))
    assert chance_level("accuracy", [torch.full((3,), -100)]) is None


def test_numbers():
    for name, answer in (("mse", NUMBERS.mean()), ("mae", NUMBERS.median())):
        found = chance_level(name, list(NUMBERS.split(2)))
        assert found.value == pytest.approx(score(name, answer.expand(len(NUMBERS)), NUMBERS))


def test_the_rest():
    assert chance_level("spearman", [NUMBERS]).value == 0
    assert chance_level("word_error_rate", [["a b"]]).value == 1
    assert score("word_error_rate", [""], ["a b"]) == 1
    logits = torch.zeros(2, 3, 11)
    assert chance_level("perplexity", [], 11).value == pytest.approx(
        score("perplexity", logits, torch.zeros(2, 3).long())
    )
    assert chance_level("kl", [NUMBERS]) is None
