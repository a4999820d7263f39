"""Latency predicted from layers: with a clock that is not one, so that every number is known."""

from __future__ import annotations

import copy
import functools
import json
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from autoquant.measure import latency
from autoquant.measure import layers as module
from autoquant.measure.latency import LatencyModel, site_choices
from autoquant.measure.latency_cache import LatencyCache
from autoquant.measure.layers import measure_latency
from autoquant.measure.speed import FLOAT, speed_class
from autoquant.measure.timing import WARM_UP
from autoquant.measure.units import SIGNATURES, choose, find_units, signature
from autoquant.methods.applier import Applier
from autoquant.methods.correction.bias import BiasCorrection
from autoquant.methods.rounding.learned_rounding import LearnedRounding
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.spec.recipe import FLOAT_SITE, ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.space import SearchSpace

BIAS = BiasCorrection()
CPU = torch.device("cpu")
SPACE = SearchSpace.parse(
    "autoquant_space: 1\n"
    "rules:\n"
    "  - {weight_bits: [8, 4, 16], weight_calibration: [mse, max], activation_bits: [8, 16]}\n",
    "test",
)
REST = 0.5
"""Seconds that the fake model takes beside its layers."""


class Plain(nn.Module):
    """Two layers of the same shape, one of another, and one that is called in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.loop = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(F.relu(self.a(x), inplace=True)))
        for _ in range(3):
            x = self.loop(x).add_(1.0)
        return x


class Tied(nn.Module):
    """A table that is looked up and multiplied with, as a layer and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.out.weight = self.words.weight
        self.positions = nn.Embedding(7, 8)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.out(x), F.linear(x, self.positions.weight)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, key=x, value=x, need_weights=False)[0])


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.cell = nn.GRU(8, 4, batch_first=True), nn.LSTMCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, [2, 3], batch_first=True, enforce_sorted=False)
        _, h = self.gru(packed)
        state = None
        for _ in range(5):
            state = self.cell(h[0], state)
        assert state is not None
        return state[0]


class Growing(nn.Module):
    """Generates: every step is longer than the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(10):
            x = torch.cat([x, self.step(x)[:1]])
        return x


class Fake:
    """A clock: a layer takes its weights' bits × numbers in microseconds, the model their sum."""

    def __init__(self, applier: Applier) -> None:
        self.applier = applier
        self.timed: Counter[str] = Counter()

    def of(self, name: str, part: nn.Module) -> float:
        total = 0.0
        for _, site in self.inside(part):
            recipe = self.applier._current.get(site.name, FLOAT_SITE)
            bits = recipe.weight_bits + (8 if recipe.activation is None else 1)
            total += 1e-6 * bits * site.numel
        return total

    def inside(self, part: nn.Module) -> list[Any]:
        units = find_units(self.applier.prepared)
        return [row for unit in units if unit.module is part for row in unit.sites]

    def __call__(self, call: Any) -> float:
        assert isinstance(call, functools.partial)
        before = copy.copy(self.applier._current)
        call()
        assert self.applier._current == before
        assert not torch.is_grad_enabled()
        owner = getattr(call.func, "__self__", None)
        if isinstance(owner, nn.Module):
            name = next(n for n, m in self.applier.prepared.model.named_modules() if m is owner)
            self.timed[name] += 1
            return self.of(name, owner)
        return REST + self.whole()

    def whole(self) -> float:
        calls: Counter[nn.Module] = Counter()
        handles = [
            u.module.register_forward_hook(lambda m, *_: calls.update([m]))
            for u in find_units(self.applier.prepared)
        ]
        self.run(self.applier.prepared.model)
        for handle in handles:
            handle.remove()
        return sum(n * self.of("", m) for m, n in calls.items())

    run: Any = None


def inputs_of(kind: type[nn.Module]) -> Tensor:
    if kind is Tied:
        return torch.randint(11, (2, 7))
    if kind is Growing:
        return torch.randn(2, 4)
    return torch.randn(2, 3, 8) if kind in (Attending, Sequences) else torch.randn(5, 8)


class Setting:
    def __init__(self, kind: type[nn.Module], path: Any = None) -> None:
        torch.manual_seed(0)
        x = inputs_of(kind)
        self.run = lambda model, _=None: model(x)
        prepared = prepare(kind().eval(), self.run)
        self.applier = Applier(prepared, calibrate(prepared, [None], self.run))
        self.spaces = SPACE.resolve(prepared.sites)
        self.clock = Fake(self.applier)
        self.clock.run = self.run
        self.path = path

    def table(self) -> LatencyModel:
        cache = LatencyCache(self.path)
        return measure_latency(
            self.applier, self.spaces, self.run, CPU, samples=5, cache=cache, clock=self.clock
        )

    def uniform(self, bits: int, activation: int | None) -> dict[str, SiteRecipe]:
        act = None if activation is None else ActivationScheme(activation)
        return {
            s.name: SiteRecipe(WeightScheme(bits), act if s.activation else None)
            for s in self.applier.prepared.sites
        }

    def true(self, sites: dict[str, SiteRecipe]) -> float:
        self.applier.apply(sites)
        seconds = REST + self.clock.whole()
        self.applier.to_float()
        return seconds


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "latency.json"


KINDS = [Plain, Tied, Attending, Sequences, Growing]


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_recipes_are_predicted_as_they_are(kind, path):
    setting = Setting(kind, path)
    table = setting.table()
    assert table.samples == 5
    assert table.rest == pytest.approx(REST)
    assert table.seconds({}) == pytest.approx(table.float_seconds)
    for bits, activation in ((8, 8), (4, 8), (8, None)):
        sites = setting.uniform(bits, activation)
        assert table.seconds(sites) == pytest.approx(setting.true(sites))
        assert table.seconds(sites) < table.float_seconds
    assert not setting.applier._current


@pytest.mark.parametrize("kind", [Plain, Tied, Growing])
def test_mixed_recipes_of_single_layers_are_predicted_exactly(kind, path):
    setting = Setting(kind, path)
    table = setting.table()
    sites = setting.uniform(8, 8)
    names = list(sites)
    sites[names[0]] = FLOAT_SITE
    sites[names[-1]] = SiteRecipe(WeightScheme(4), sites[names[-1]].activation)
    assert table.seconds(sites) == pytest.approx(setting.true(sites))


def test_calibration_and_learning_cost_no_time(path):
    setting = Setting(Plain, path)
    table = setting.table()
    plain = setting.uniform(8, 8)
    other = {
        n: SiteRecipe(
            WeightScheme(8, calibration="mse", rounding=LearnedRounding(0.01)), s.activation, BIAS
        )
        for n, s in plain.items()
    }
    assert table.seconds(other) == table.seconds(plain)


def test_layers_of_one_shape_share_their_times(path):
    setting = Setting(Plain, path)
    setting.table()
    assert set(setting.clock.timed) == {"a", "c", "loop"}
    assert "b" in setting.table()._by_site


def test_what_was_measured_before_is_not_measured_again(path):
    first = Setting(Plain, path)
    table = first.table()
    again = Setting(Plain, path)
    assert again.table() == table
    assert not again.clock.timed
    stored = json.loads(path.read_text())["seconds"]
    assert len(stored) == 3 * 6
    path.write_text("{")
    damaged = Setting(Plain, path)
    assert damaged.table() == table
    assert damaged.clock.timed == first.clock.timed


class Own(nn.Linear):
    def gain(self) -> Tensor:
        return self.weight.norm()


class Subclassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Own(8, 8), Own(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_a_layer_of_the_users_own_class_is_neither_shared_nor_kept(path):
    setting = Setting(Subclassed, path)
    setting.table()
    assert set(setting.clock.timed) == {"a", "b"}
    assert not path.exists()


def test_the_users_own_hooks_see_no_calls_but_the_models(path):
    setting = Setting(Plain, path)
    seen: Counter[str] = Counter()
    hook = setting.applier.prepared.model.a.register_forward_hook(  # type: ignore[union-attr]
        lambda *_: seen.update(["a"])
    )
    setting.clock.whole = lambda: 0.1  # type: ignore[method-assign]
    setting.table()
    whole = WARM_UP + module.WHOLE_LEAST
    assert seen["a"] == whole + 2  # one run to count the calls, one to time them
    hook.remove()


def test_a_layer_inside_attention_belongs_to_it(path):
    setting = Setting(Attending, path)
    units = find_units(setting.applier.prepared)
    assert {u.name: [s.name for _, s in u.sites] for u in units} == {
        "attention": ["attention.in_proj_weight", "attention.out_proj"],
        "head": ["head"],
    }
    shares = units[0].shares
    assert shares == {"attention.in_proj_weight": 0.75, "attention.out_proj": 0.25}
    assert len(setting.table().layers) == 2


def test_failures_of_the_model_leave_it_in_float_without_hooks(path):
    setting = Setting(Plain, path)
    calls = iter(range(100))

    def run(model: nn.Module) -> Any:
        setting.run(model)
        if next(calls) == module.WHOLE_LEAST + 2:
            raise RuntimeError("the user's own")

    setting.clock.whole = lambda: 0.1  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the user's own"):
        measure_latency(
            setting.applier,
            setting.spaces,
            run,
            CPU,
            cache=LatencyCache(path),
            clock=setting.clock,
        )
    assert not setting.applier._current
    assert all(not m._forward_pre_hooks for m in setting.applier.prepared.model.modules())


def test_the_rest_is_never_negative():
    layers = (module.LayerTimes("a", {"a": 1.0}, {FLOAT: 2.0, "w8 per_channel symmetric": 1.0}),)
    table = LatencyModel("cpu", 1, 1.5, layers)
    assert table.rest == 0
    assert table.seconds({}) == 2.0


@pytest.mark.parametrize("kind", [Plain, Tied, Growing])
def test_one_model_measured_as_a_whole_sets_how_layers_add_up(kind, path, monkeypatch):
    setting = Setting(kind, path)
    table = setting.table()
    wide, narrow = setting.uniform(8, 8), setting.uniform(4, 8)
    gained = table.float_seconds - table.seconds(wide)
    assert table.fitted(wide, table.float_seconds - 0.8 * gained) == table  # too little to tell
    monkeypatch.setattr(latency, "TELLING", 1e-9)
    fitted = table.fitted(wide, table.float_seconds - 0.8 * gained)
    assert fitted.slope == pytest.approx(0.8)
    assert fitted.seconds({}) == pytest.approx(table.float_seconds)
    assert fitted.seconds(wide) == pytest.approx(table.float_seconds - 0.8 * gained)
    saved = table.float_seconds - table.seconds(narrow)
    assert fitted.seconds(narrow) == pytest.approx(table.float_seconds - 0.8 * saved)
    assert fitted.fitted(wide, table.seconds(wide)).slope == pytest.approx(1)  # anew, not further
    assert table.fitted(wide, -100.0).slope == latency.SLOPES[1]
    assert table.fitted(wide, 100.0).slope == latency.SLOPES[0]
    assert table.fitted({}, 100.0) == table
    assert LatencyModel.read(json.loads(json.dumps(fitted.plain()))) == fitted


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_survives_json(kind, path):
    table = Setting(kind, path).table()
    read = LatencyModel.read(json.loads(json.dumps(table.plain())))
    assert read == table
    assert read.seconds({}) == table.seconds({})


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_faster_than_the_fastest(kind, path):
    setting = Setting(kind, path)
    table = setting.table()
    choices = site_choices(setting.applier.prepared, setting.spaces)
    fastest = table.fastest(choices)
    assert fastest <= table.seconds(setting.uniform(4, 8)) + 1e-12
    best = {n: min(r, key=lambda c, n=n: table.site_seconds(n, c)) for n, r in choices.items()}
    assert table.seconds(best) == pytest.approx(fastest)


def test_a_choice_that_a_layer_can_not_take_costs_nothing_else(path, monkeypatch):
    setting = Setting(Plain, path)
    apply = setting.applier.apply

    def refuse(sites):
        if any(r.weight is not None and r.weight.bits == 4 for r in sites.values()):
            raise module.TrialError("NaN")
        return apply(sites)

    monkeypatch.setattr(setting.applier, "apply", refuse)
    table = setting.table()
    labels = {label for row in table.layers for label in row.seconds}
    assert speed_class(SiteRecipe(WeightScheme(8))) in labels
    assert not any(label.startswith("w4") for label in labels)
    slow = {"a": SiteRecipe(WeightScheme(4))}
    assert table.seconds(slow) == pytest.approx(table.seconds({}))


def test_signatures_tell_shapes_strides_and_types_apart():
    x = torch.zeros(2, 3, 4, 4)
    seen = {
        signature((x,), {}),
        signature((x.contiguous(memory_format=torch.channels_last),), {}),
        signature((x.double(),), {}),
        signature((x[:1],), {}),
        signature((x, None), {}),
        signature((), {"input": x}),
    }
    assert len(seen) >= 5
    assert signature((x,), {}) == signature((x + 1,), {})
    packed = pack_padded_sequence(torch.zeros(2, 3, 4), [3, 2], batch_first=True)
    other = pack_padded_sequence(torch.zeros(2, 3, 4), [3, 1], batch_first=True)
    assert signature((packed,), {}) != signature((other,), {})
    assert "object" in signature((object(),), {})


def test_many_lengths_are_timed_on_a_few():
    counts = {signature((torch.zeros(n, 4),), {}): 2 for n in range(1, 40)}
    found = choose(counts)
    assert len(found) == SIGNATURES
    assert sum(found.values()) == sum(counts.values())
    assert choose(dict(list(counts.items())[:2])) == dict(list(counts.items())[:2])
