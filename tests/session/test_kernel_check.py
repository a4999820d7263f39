"""Fast kernels against the reference, on a model's own layers, before any trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoquant.errors import UserError
from autoquant.kernels.cpu import onednn
from autoquant.kernels.cpu.backend import CpuBackend
from autoquant.kernels.engine import Engine
from autoquant.models.files import LoadedModel
from autoquant.models.task import Task
from autoquant.optimize.run import search
from autoquant.session import session as module
from autoquant.session.kernel_check import check_kernels
from autoquant.session.session import Session, open_session
from autoquant.spec.space import SearchSpace, shipped

CPU = torch.device("cpu")
NARROW = "autoquant_space: 1\nrules: [{weight_bits: [6, 4], activation_bits: [7]}]\n"
"""Products that are exact on every processor, so that kernels take them everywhere."""


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(54, 20),
        nn.GELU(),
        nn.Linear(20, 5),
    ).eval()
    model[7].weight = nn.Parameter(torch.randn(20, 5).t() / 4)  # its numbers lie the other way
    return model


def session_of(backend: Any = None) -> Session:
    data = [(torch.randn(6, 3, 8, 8), torch.randint(0, 5, (6,))) for _ in range(9)]
    task = Task(evaluation_data=lambda: data, metric="accuracy")
    made = open_session(LoadedModel(net(), "module", "m", "0" * 64), task, CPU)
    if backend is not None:
        made.prepared.engine.backends = (backend,)
    made.baseline("search")
    return made


def check(session: Session, space: str | None = None) -> None:
    chosen = SearchSpace.parse(NARROW, "narrow") if space is None else SearchSpace.load(space)
    check_kernels(session, chosen.resolve(session.prepared.sites))


class Counting:
    """The CPU's backend, each of whose products passes through ``change``."""

    name = "int8"

    def __init__(self, change: Callable[[Any], Any]) -> None:
        self.change = change
        self.prepared = 0

    def prepare(self, operation: Any, *words: Any) -> Any:
        product = CpuBackend().prepare(operation, *words)
        self.prepared += product is not None
        return None if product is None else self.change(product)


class Wrong:
    """A product with a fault at one number of its output, as real numbers or as bytes."""

    backend = "int8"

    def __init__(self, product: Any, *, real: float = 0.0, steps: int = 0) -> None:
        self.product, self.off, self.steps = product, real, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.product, name)

    def __call__(self, x: Tensor, bias: Tensor | None, clamp: Any = None) -> Tensor | None:
        y = self.product(x, bias, clamp)
        if y is not None:
            y[(-1,) * y.dim()] += self.off
        return y

    def handed(self, *words: Any) -> Tensor | None:
        y = self.product.handed(*words)
        return None if y is None else (y.to(torch.int16) + self.steps).clamp(0, 255).byte()


@pytest.mark.skipif(onednn.missing(CPU) is not None, reason="no products of integers here")
def test_kernels_that_are_right_pass_on_every_layer():
    backend = Counting(lambda product: product)
    check(session_of(backend))
    assert backend.prepared >= 8  # four layers at two widths


@pytest.mark.parametrize("space", shipped())
def test_every_shipped_space_can_be_checked(space):
    check(session_of(), space)


@pytest.mark.skipif(onednn.missing(CPU) is not None, reason="no products of integers here")
@pytest.mark.parametrize("fault", [{"real": 0.01}, {"steps": 2}])
def test_a_kernel_that_is_wrong_is_named_with_its_layer(fault):
    session = session_of(Counting(lambda product: Wrong(product, **fault)))
    with pytest.raises(UserError) as caught:
        check(session)
    said = str(caught.value)
    assert said.startswith("0: the fast kernel (int8) and the reference differ on this machine")
    assert "with weights of 6 bits per_channel symmetric and activations of 7 bits" in said
    assert said.endswith("search with --backend reference")
    assert ("of the integers that it hands to 3" in said) == ("steps" in fault)


@pytest.mark.skipif(onednn.missing(CPU) is not None, reason="no products of integers here")
def test_a_search_ends_on_it_and_the_reference_goes_on(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = [(torch.randn(6, 3, 8, 8), torch.randint(0, 5, (6,))) for _ in range(9)]
    task = Task(evaluation_data=lambda: data, metric="accuracy")
    space = SearchSpace.parse(NARROW, "narrow")
    make = module.make_engine

    def faulty(device: torch.device, name: str) -> Engine:
        made = make(device, name)
        if made.backends:
            made.backends = (Counting(lambda product: Wrong(product, real=1.0)),)
        return made

    monkeypatch.setattr(module, "make_engine", faulty)
    with pytest.raises(UserError, match="0: the fast kernel"):
        search(net(), task, space=space, trials=1)
    assert not list(tmp_path.rglob("*.journal"))
    assert search(net(), task, space=space, trials=1, backend="reference").trials["complete"] == 1


def test_the_reference_alone_has_nothing_to_be_checked():
    session = session_of()
    session.prepared.engine.backends = ()
    check(session)
