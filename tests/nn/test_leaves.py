from __future__ import annotations

import enum
import math
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from autoquant.nn.leaves import difference, frozen, leaves

X = torch.tensor([1.0, -2.0])
Pair = namedtuple("Pair", "scores boxes")


@dataclass
class Output:
    hidden: torch.Tensor
    inner: object = None


class Layer:
    def __init__(self, x):
        self.keys = x


class Cache:
    """As a decoder's cache of keys and values: an object that is new in every call."""

    __slots__ = ("__dict__", "first")

    def __init__(self, x):
        self.first = x
        self.layers = [Layer(x + 1), Layer(x + 2)]
        self.seen = object()
        self.me = self  # a cycle


class Colour(enum.Enum):
    RED = 1


HOLDERS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, 1, None),
    "list": lambda x: ["a", x],
    "named tuple": lambda x: Pair(X, x),
    "dictionaries in dictionaries": lambda x: {"a": {"b": {"c": x}}, "d": 3},
    "other mappings": lambda x: OrderedDict(a=UserDict(b=x)),
    "dataclass": lambda x: Output(X, Output(x)),
    "object": Cache,
    "object in a mapping": lambda x: {"logits": X, "past_key_values": Cache(x)},
    "array": lambda x: x.numpy(),
    "sparse": lambda x: torch.outer(x, x).to_sparse(),
    "masked": lambda x: torch.cat([x, torch.tensor([-math.inf, math.inf, math.nan])]),
    "integers": lambda x: (100 * x).long(),
    "complex": lambda x: x + 1j,
    "enum": lambda x: (Colour.RED, x),
    "half": lambda x: x.half(),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_what_outputs_hold_is_compared(name):
    hold = HOLDERS[name]
    assert difference(hold(X), hold(X.clone()), 0.0) is None
    assert difference(hold(X), hold(X + 0.25), 1e-4) is not None
    assert any(isinstance(leaf, torch.Tensor) for _, leaf in leaves(hold(X)))


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (X, X + 0.5, "the output differs by 0.5, its largest number being 2"),
        ({"x": {"y": X}}, {"x": {"y": X + 1}}, "output['x']['y'] differs by 1"),
        (Pair(X, X), Pair(X, X * 2), "output.boxes differs by 2"),
        (X, X[:1], "the output has the shape [2], and then [1]"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "the output differs in 1 of 2 entries"),
        (
            torch.tensor([1.0, -math.inf]),
            torch.tensor([1.0, 5.0]),
            "the output has other infinities or NaN in 1 of 2 entries",
        ),
        ((1, "a"), (1, "b"), "output[1] is 'a', and then 'b'"),
        ([X], [X, X], "1 tensors and constants, and then 2"),
        (X, 1.0, "the output is a tensor of shape [2], and then 1.0"),
    ],
)
def test_a_difference_is_named(a, b, said):
    assert difference(a, b, 1e-4).startswith(said)


def test_what_is_no_output_is_left_out():
    assert leaves((nn.Linear(2, 2), print, int, np.array(["a"]))) == [("[3]", ["a"])]


def test_frozen_leaves_are_nobody_elses():
    x = X.clone()
    ((_, kept),) = frozen([x])
    x.zero_()
    assert kept.tolist() == X.tolist()
