"""Replayed programs give what a call gives, for whatever a model's code may do."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoquant.measure.programs import Programs
from autoquant.measure.reuse_check import same_bits
from autoquant.methods.applier import Applier
from autoquant.methods.correction.bias import BiasCorrection
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from tests.measure.recorder import EagerChain, EagerEngine, EagerProduct, Moved, StandIn
from tests.measure.test_reuse import MODELS, Residual

CHOICES = (
    SiteRecipe(),
    SiteRecipe(WeightScheme(4)),
    SiteRecipe(WeightScheme(8), ActivationScheme(8)),
    SiteRecipe(WeightScheme(3, "per_tensor", "asymmetric"), ActivationScheme(5)),
    SiteRecipe(WeightScheme(4), ActivationScheme(6), correction=BiasCorrection()),
    SiteRecipe(None, ActivationScheme(5, "per_token")),
)
"""The third and fourth are of one form where a layer has a product: other numbers, no more."""


class Bench:
    """A model that is recorded, beside one that is called."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        shape: tuple[int, ...],
        most: int = 8,
        product: type[EagerProduct] = EagerProduct,
    ) -> None:
        self.product = product
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build().eval()
            self.batches = [torch.randn(shape) for _ in range(3)]
        plain = copy.deepcopy(model)
        self.said: list[str] = []
        self.ours, self.theirs = self._applier(model), self._applier(plain)
        self.model = self.ours.prepared.model
        self.sites = [site.name for site in self.ours.prepared.sites]
        self.recorder = StandIn()
        self.programs = Programs(self.ours.prepared, self.recorder, self.said.append, most)

    def _applier(self, model: nn.Module) -> Applier:
        run = lambda m, x=self.batches[0]: m(x.clone())  # noqa: E731
        prepared = prepare(model, run, engine=EagerEngine(self.product))
        return Applier(prepared, calibrate(prepared, [b.clone() for b in self.batches], run))

    def apply(self, choices: list[int]) -> None:
        recipe = {name: CHOICES[c] for name, c in zip(self.sites, choices, strict=True)}
        self.ours.apply(recipe)
        self.theirs.apply(recipe)

    def compare(self, choices: list[int] | None = None) -> None:
        if choices is not None:
            self.apply(choices)
        for batch in self.batches:
            with torch.no_grad():
                expected = self.theirs.prepared.model(batch.clone())
                with self.programs.batch():
                    found = self.model(batch)
            assert same_bits(found, expected)


@pytest.mark.parametrize("product", [EagerProduct, EagerChain])
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_replays_give_what_calls_do(name, product, data):
    bench = Bench(*MODELS[name], data.draw(st.sampled_from([1, 3, 8])), product)
    n = len(bench.sites)
    current = [0] * n
    for _ in range(data.draw(st.integers(2, 6))):
        for site in data.draw(st.lists(st.integers(0, n - 1), max_size=3)):
            current[site] = data.draw(st.integers(0, len(CHOICES) - 1))
        bench.compare(current)


@pytest.mark.parametrize("name", ["residual", "in_place", "chained", "perceptron", "shared"])
def test_a_model_is_one_program_and_a_recipe_of_its_form_is_copied_in(name):
    bench = Bench(*MODELS[name])
    n = len(bench.sites)
    bench.compare([2] * n)
    assert (bench.programs.recordings, bench.programs.replays) == (1, 2)
    draw = random.Random(0)
    for _ in range(10):
        bench.compare([draw.choice((2, 3)) for _ in range(n)])
    assert (bench.programs.recordings, bench.programs.replays) == (1, 32)
    assert not bench.said
    bench.compare([2] * (n - 1) + [0])  # a float layer is another program
    assert bench.programs.recordings == 2
    bench.compare([3] * n)
    assert bench.programs.recordings == 2


def test_what_a_recipe_decides_is_where_it_was():
    bench = Bench(Residual, (4, 8))
    n = len(bench.sites)
    bench.compare([2] * n)
    recorded = {t.data_ptr() for t, _ in bench.recorder.tapes[0].places}
    bench.compare([3] * n)
    for fixed in bench.programs._fixed:
        for place in fixed._places.values():
            assert all(t.data_ptr() in recorded for t in place.tensors)


class Stateful(nn.Module):
    """Keeps what it was given last."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        before, self.last = self.last, x
        return self.two(self.one(x)) + (0 if before is None else before)


class Random(nn.Module):
    """Draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) + torch.rand(8)


class Waits(nn.Module):
    """One of its blocks decides by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.middle = Decides()
        self.last = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return -y if y.mean() > 0 else y


class Writes(nn.Module):
    """Writes into its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.linear(x)


def test_what_decides_by_numbers_is_named_and_its_neighbours_are_recorded():
    bench = Bench(Waits, (4, 8))
    for _ in range(2):
        bench.compare([2] * 3)
    assert [line.partition(":")[0] for line in bench.said] == ["middle is not recorded"]
    assert "waits for the device" in bench.said[0]
    assert bench.programs.recordings == 3  # first, last, and the layer of the middle one
    bench.compare([3] * 3)
    assert bench.programs.recordings == 3


@pytest.mark.parametrize("build", [Stateful, Random])
def test_what_keeps_something_or_draws_is_not_replayed(build):
    bench = Bench(build, (4, 8))
    bench.ours.apply({})
    with torch.no_grad():
        for batch in bench.batches:
            with bench.programs.batch():
                bench.model(batch)
    assert bench.said == [
        "the model is not recorded: draws random numbers, or keeps something between calls"
    ]


def test_what_writes_into_its_argument_is_called():
    bench = Bench(Writes, (4, 8))
    with torch.no_grad(), bench.programs.batch():
        bench.model(bench.batches[0])
    assert bench.said == ["the model is not recorded: writes into its arguments"]


def test_shapes_that_change_all_the_time_are_called_once_there_are_too_many():
    bench = Bench(Residual, (4, 8), most=3)
    bench.apply([2] * len(bench.sites))
    for _ in range(3):
        for rows in range(1, 7):
            x = torch.randn(rows, 8)
            with torch.no_grad():
                expected = bench.theirs.prepared.model(x)
                with bench.programs.batch():
                    assert same_bits(bench.model(x), expected)
    assert bench.programs.recordings == 3
    assert bench.said == ["the model is given other shapes all the time: only some are recorded"]


def test_programs_of_recipes_that_are_gone_make_room():
    bench = Bench(Residual, (4, 8), most=2)
    n = len(bench.sites)
    for floats in range(n):
        bench.compare([0] * floats + [2] * (n - floats))
    assert bench.programs.recordings == n
    assert not bench.said


def test_weights_that_moved_are_recorded_anew():
    bench = Bench(Residual, (4, 8))
    n = len(bench.sites)
    bench.compare([2] * n)
    for model in (bench.model, bench.theirs.prepared.model):
        bias = model.head.bias
        with torch.no_grad():
            bias.add_(1)  # in place: what was recorded reads it
    bench.compare()
    assert bench.programs.recordings == 1
    for model in (bench.model, bench.theirs.prepared.model):
        model.head.bias.data = model.head.bias.data + 1
    with pytest.raises(Moved):
        bench.recorder.tapes[0].replay()
    bench.compare()
    assert bench.programs.recordings == 2


def test_what_a_recipe_was_made_of_is_let_go_with_it():
    bench = Bench(Residual, (4, 8))
    n = len(bench.sites)
    held = []
    for choice in (2, 3, 4):
        bench.compare([choice] * n)
        held.append(weakref.ref(next(iter(bench.ours.prepared.slots.values())).held))
    bench.ours._weights.clear()  # as where there is no room for more
    bench.ours.to_float()
    bench.programs.clear()
    gc.collect()
    assert [ref() for ref in held] == [None] * 3


def test_hooks_of_parts_are_called_and_what_observes_sees_every_call():
    bench = Bench(Residual, (4, 8))
    n = len(bench.sites)
    bench.compare([2] * n)
    heard = []
    hook = bench.model.head.register_forward_hook(lambda *call: heard.append(call[2]))
    bench.compare([2] * n)
    assert len(heard) == 3
    hook.remove()
    seen = []
    slot = next(iter(bench.ours.prepared.slots.values()))
    slot.observe = seen.append
    bench.compare()
    assert len(seen) == 3


def test_gradients_and_the_reference_are_computed_by_calls():
    bench = Bench(Residual, (4, 8))
    bench.compare([2] * len(bench.sites))
    before = bench.programs.replays
    x = bench.batches[0].clone().requires_grad_()
    with bench.programs.batch():
        bench.model(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad(), bench.ours.prepared.engine.reference(), bench.programs.batch():
        bench.model(bench.batches[0])
    with torch.no_grad(), bench.programs.paused(), bench.programs.batch():
        bench.model(bench.batches[0])
    assert bench.programs.replays == before


def test_what_was_returned_is_the_callers():
    bench = Bench(Residual, (4, 8))
    bench.apply([2] * len(bench.sites))
    results = []
    with torch.no_grad():
        for batch in bench.batches:
            with bench.programs.batch():
                results.append(bench.model(batch))
        for found, batch in zip(results, bench.batches, strict=True):
            assert same_bits(found, bench.theirs.prepared.model(batch))
