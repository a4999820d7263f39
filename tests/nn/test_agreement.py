"""Outputs are compared number by number, each with others of its kind."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

from autoquant.nn import agreement
from autoquant.nn.agreement import Scales, disagreement, tolerance_of


class Found(NamedTuple):
    boxes: torch.Tensor
    scores: torch.Tensor


def boxes_and_scores():
    torch.manual_seed(0)
    return torch.cat([torch.rand(20, 4) * 640, torch.rand(20, 1)], 1)


def test_outputs_are_compared_leaf_by_leaf():
    a = {"x": torch.ones(3), "n": [1, None, torch.tensor([2])], "v": 0.5}
    b = copy.deepcopy(a)
    assert disagreement(a, b) is None
    b["x"] += 5e-4
    assert disagreement(a, b) is None
    assert "output['x'] differs by 0.0005" in disagreement(a, b, tolerance=1e-4)
    for key, value in (("x", torch.ones(4)), ("n", [2, None, torch.tensor([2])]), ("v", 0.51)):
        assert disagreement(a, {**a, key: value}).startswith(f"output['{key}']")
    assert disagreement(a, {"x": torch.ones(3)}) is not None
    assert disagreement(torch.tensor([1.0]), torch.tensor([float("nan")])) is not None
    assert disagreement(torch.tensor([1]), torch.tensor([2])) == "output differs in 1 of 1 numbers"
    assert disagreement(torch.ones(1), "1") is not None


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_a_score_beside_boxes_in_pixels_is_held_to_its_own_scale(axis):
    a = boxes_and_scores().reshape(5, 4, 5).movedim(2, axis)
    for column, size, same in ((4, 0.1, False), (4, 5e-4, True), (0, 0.1, True), (0, 5, False)):
        b = a.clone()
        b.select(axis, column)[3] += size
        assert (disagreement(a, b) is None) == same


def test_a_kind_has_the_scale_that_it_has_on_all_data():
    small, large = torch.tensor([[1e-4, 3.0]]), torch.tensor([[2.0, 3.0]])
    off = small + torch.tensor([[1e-3, 0.0]])
    assert disagreement(small, off) is not None
    assert disagreement(small, off, Scales(small, large)) is None
    # Sequences of other lengths share the scale of their features, and of the whole.
    rows = [torch.randn(2, n, 3) * torch.tensor([1.0, 100.0, 1e-3]) for n in (4, 5)]
    scales = Scales(*rows)
    assert disagreement(rows[0], rows[0] + torch.tensor([0, 0.05, 0]), scales) is None
    assert disagreement(rows[0], rows[0] + torch.tensor([0, 0, 0.05]), scales) is not None


def test_what_is_no_number_and_what_is_masked_agrees_with_itself():
    a = Found(torch.tensor([[1.0, -torch.inf], [torch.nan, 2.0]]), torch.tensor([1j, 2.0]))
    assert disagreement(a, copy.deepcopy(a)) is None
    b = Found(a.boxes.nan_to_num(0.0), a.scores)
    assert "boxes" in disagreement(a, b)
    assert "scores" in disagreement(a, Found(a.boxes, a.scores * 1.1))


@pytest.mark.parametrize("count", [1, 7, 60, 1000])
def test_large_outputs_are_compared_some_samples_at_a_time(monkeypatch, count):
    monkeypatch.setattr(agreement, "AT_ONCE", count)
    torch.manual_seed(0)
    a = torch.randn(9, 4, 5)
    b = a + 1e-6 * torch.randn(9, 4, 5)
    assert disagreement(a, b) is None
    for i in range(9):
        c, d = b.clone(), b.clone()
        c[i, 3, 1] += 0.5
        c[(i + 4) % 9, 3, 1] += 1.5
        assert "differs by 1.5 where" in disagreement(a, c)
        d[i, 0, 0] = math.nan
        assert disagreement(a, d) is not None
    for shape in [(), (0,), (0, 3), (3, 0)]:
        assert disagreement(torch.ones(shape), torch.ones(shape)) is None
    assert disagreement(torch.ones(()), torch.zeros(())) is not None


def test_rounding_is_that_of_the_whole_output():
    a = torch.tensor([[1e-6, 1.0]])
    assert disagreement(a, a + 1e-6) is not None
    assert disagreement(a, a + 1e-6, rounding=1e-5) is None


def test_the_tolerance_is_that_of_the_coarsest_weights():
    assert tolerance_of(nn.Linear(2, 2)) == 1e-3
    assert tolerance_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())) == 8 / 128
    assert tolerance_of(nn.ReLU()) == 1e-3
