"""A zoo of small models that use every layer type, in every way that a forward may."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree

from autoquant.methods.applier import Applier
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import Prepared, prepare
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.grouped(self.depthwise(self.stem(x)))).relu_()
        return {"logits": self.head(self.up(x, [9, 9]).mean((2, 3)))}


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding="same", dilation=2)
        self.up_one = nn.ConvTranspose1d(6, 4, 3, groups=2)
        self.three = nn.Conv3d(1, 2, (1, 3, 3), padding=(0, 1, 1), padding_mode="circular")
        self.up_three = nn.ConvTranspose3d(2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_three(self.three(self.up_one(self.one(x))[:, None, None]))


class Language(nn.Module):
    """An encoder whose embedding is its head too, once as a layer and once as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.positions = nn.Embedding(9, 16)
        self.out = nn.Linear(16, 11, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
        x = self.encoder(x, src_key_padding_mask=mask)
        return self.out(x), F.linear(x, self.positions.weight)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True)
        self.decoder = nn.TransformerDecoderLayer(8, 2, 12)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> list[Any]:
        x, _ = self.own(x, x, x, need_weights=False)
        y, seen = self.cross(x, memory, memory[..., :4], key_padding_mask=mask)
        return [self.decoder(y, x), seen, None]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, 2, bidirectional=True, batch_first=True, proj_size=5)
        self.gru = nn.GRU(10, 8, bidirectional=True)
        self.rnn = nn.RNN(16, 4, bias=False, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        packed = pack_padded_sequence(x, [3, 5], batch_first=True, enforce_sorted=False)
        out, (h, c) = self.lstm(packed)
        out, _ = self.gru(out)
        last, _ = self.rnn(out.data[None])
        return last, h, c


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(4, 6), nn.GRUCell(6, 6)
        self.rnn = nn.RNNCell(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        state, h = None, None
        for step in x:
            state = self.lstm(step, state)
            h = self.rnn(self.gru(state[0], h), h)
        assert h is not None
        return h


class Scaled(nn.Linear):
    """Computes as its base does, and has methods of its own."""

    def gain(self) -> Tensor:
        return self.weight.norm()


class Branches(nn.Module):
    """Dicts, None, lists of layers, a layer called in a loop, and code that asks the data."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(3, 8)})
        self.steps = nn.ModuleList([Scaled(8, 8), nn.Linear(8, 8, bias=False)])
        self.shared = self.steps[1]
        self.seldom = nn.Linear(8, 8)

    def forward(self, batch: Mapping[str, Tensor | None]) -> dict[str, Any]:
        x = sum(self.enter[k](input=v) for k, v in batch.items() if v is not None)
        assert isinstance(x, Tensor)
        while x.abs().max() < 3.0 * self.steps[0].gain():
            x = self.shared(F.relu(self.steps[0](x), inplace=True)) * 2.0 + x + 1.0
        if not x.isfinite().all():
            x = self.seldom(x)
        return {"x": x, "steps": None}


def tokens() -> Tensor:
    return torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(3))


PADDING = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
CASES: dict[str, tuple[type[nn.Module], Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "convolutions": (Convolutions, lambda: ((torch.randn(2, 3, 9, 9),), {})),
    "volumes": (Volumes, lambda: ((torch.randn(2, 4, 8),), {})),
    "language": (Language, lambda: ((tokens(),), {"mask": PADDING})),
    "attention": (Attention, lambda: ((torch.randn(3, 2, 8), torch.randn(4, 2, 6), None), {})),
    "recurrent": (Recurrent, lambda: ((torch.randn(2, 5, 6),), {})),
    "cells": (Cells, lambda: ((torch.randn(3, 2, 4),), {})),
    "branches": (Branches, lambda: (({"a": torch.randn(2, 4), "b": None},), {})),
}


def _randomize_norms(model: nn.Module) -> None:
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, -1, 1)


@dataclasses.dataclass
class Case:
    """A float model with its inputs; ``run`` returns its outputs as a list of tensors."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mode: Callable[[], Any] = torch.no_grad

    def run(self, model: nn.Module, _: Any = None) -> list[Tensor]:
        with self.mode():
            output = model(*self.args, **self.kwargs)
        return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]

    def prepared(self) -> Prepared:
        """Prepare a copy of the model."""
        return prepare(copy.deepcopy(self.model), self.run)

    def applier(self) -> Applier:
        prepared = self.prepared()
        return Applier(prepared, calibrate(prepared, [None], self.run))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return make(request.param)


@pytest.fixture
def make_case() -> Callable[[str], Case]:
    return make


def make(name: str) -> Case:
    torch.manual_seed(0)
    kind, inputs = CASES[name]
    model = kind().eval()
    _randomize_norms(model)
    return Case(model, *inputs())


def uniform_recipe(
    prepared: Prepared, bits: int = 8, activation: str = "per_tensor", **scheme: str
) -> dict[str, SiteRecipe]:
    """Return the same recipe for every site."""
    return {
        site.name: SiteRecipe(
            WeightScheme(bits, **scheme),
            ActivationScheme(8, activation) if site.activation else None,
        )
        for site in prepared.sites
    }


@pytest.fixture
def uniform() -> Callable[..., dict[str, SiteRecipe]]:
    return uniform_recipe


def equal_outputs(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def equal() -> Callable[[list[Tensor], list[Tensor]], bool]:
    return equal_outputs
