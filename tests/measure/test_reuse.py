"""Reused results equal computed ones, bit for bit, for whatever a model's code may do."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from autoquant.kernels.engine import make_engine
from autoquant.measure.reuse import Reuse
from autoquant.measure.reuse_check import check, same_bits
from autoquant.methods.applier import Applier
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import deploy, prepare
from autoquant.nn.converted import converted_of
from autoquant.nn.layer_output import LayerOutput
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme

MIB = 1 << 20
CHOICES = (
    SiteRecipe(),
    SiteRecipe(WeightScheme(4)),
    SiteRecipe(WeightScheme(3, "per_tensor", "asymmetric"), ActivationScheme(8)),
    SiteRecipe(None, ActivationScheme(5, "per_token")),
)


class Residual(nn.Module):
    """An MLP whose blocks are added to what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(3)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class InPlace(nn.Module):
    """Convolutions whose outputs are written into by an activation and by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.one, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU6(inplace=True)
        self.two = nn.Conv2d(8, 8, 1)
        self.tail = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1), nn.ReLU6(inplace=True))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.act(self.one(x))
        x += self.two(y)
        y = self.tail(x)  # writes into x
        return self.head((y + x.mean(1, keepdim=True)).mean((2, 3)))


class Chained(nn.Module):
    """Convolutions that hand their outputs on, one of them by way of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True))
        self.one, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU6()
        self.two, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.act(self.one(self.stem(x)))).relu()
        return self.head(x).mean((2, 3)) + x.sum((1, 2, 3))[:, None]


class Perceptron(nn.Module):
    """Linear layers with a GELU or nothing between them, handed on through a block or not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 12), nn.GELU())
        self.up, self.act, self.down = nn.Linear(12, 24), nn.GELU("tanh"), nn.Linear(24, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(self.down(self.act(self.up(y))))


class Sequences(nn.Module):
    """An LSTM on packed sequences, and a GRU with states."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(12, 5, 2)
        self.cell = nn.GRUCell(5, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        packed = pack_padded_sequence(x, [2, 4, 3, 4], batch_first=True, enforce_sorted=False)
        out, (h, c) = self.lstm(packed)
        out, lengths = pad_packed_sequence(out, batch_first=True)
        out, last = self.gru(out.transpose(0, 1))
        state = last[-1]
        for step in out:
            state = self.cell(step, state)
        return {"logits": self.head(state), "rest": (h, [c, lengths], None)}


class Shared(nn.Module):
    """One block runs twice, one layer's weight is used by name, and outputs are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.again = self.block
        self.split = Halves()
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.block(x)
        z = self.again(y - x)
        a, whole = self.split(z)
        return self.out(a["left"] + a["right"][0]), F.linear(whole, self.out.weight)


class Halves(nn.Module):
    """Returns a dict with views of one memory, and its own argument."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"a": nn.Sequential(nn.Sequential(nn.Linear(8, 16)))})

    def forward(self, x: Tensor) -> tuple[dict[str, Any], Tensor]:
        left, right = self.inner["a"](x).chunk(2, -1)
        left.add_(1)
        return {"left": left, "right": [right]}, x


class Decoder(nn.Module):
    """Greedy decoding: what runs, and how often, depends on the data and the candidate."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.words, self.cell = nn.Embedding(6, 8), nn.LSTMCell(8, 8)
        self.head, self.rare = nn.Linear(8, 6), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> list[list[int]]:
        h = self.encoder(x.mean(1))
        state = (h, torch.zeros_like(h))
        tokens, out = torch.zeros(len(x), dtype=torch.long), []
        for _ in range(8):
            state = self.cell(self.words(tokens), state)
            if state[0].mean() > 0:
                state = (self.rare(state[0]), state[1])
            tokens = self.head(state[0]).argmax(-1)
            out.append(tokens.tolist())
            if (tokens == 1).any():
                break
        return out


class Language(nn.Module):
    """A transformer encoder with tied embeddings and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.pool = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = (x[..., 0].abs() * 3).long().clamp(max=10)
        h = self.encoder(self.words(ids), src_key_padding_mask=ids == 0)
        h, seen = self.pool(h, h, h)
        return F.linear(h, self.words.weight), seen


class Nested(nn.Sequential):
    """A Sequential of Sequentials; layers without sites between, at the ends, and in place."""

    def __init__(self) -> None:
        inner = nn.Sequential(
            nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Identity()
        )
        super().__init__(nn.LayerNorm(8), inner, nn.ReLU(inplace=True), nn.Linear(8, 6), nn.Tanh())


class Appends(nn.Module):
    """Gives its layers a list to write into, as caches are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Noting() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        notes: list[Tensor] = []
        for layer in self.layers:
            x = layer(x, notes=notes)
        return torch.stack([x, *notes])


class Noting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, notes: list[Tensor]) -> Tensor:
        notes.append(self.linear(x))
        return notes[-1].tanh()


class Sneaky(nn.Module):
    """Writes into results in ways that torch does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y.data.mul_(0.5)
        z = self.two(y)
        z.numpy()[...] += 1
        return self.three(z) + y


class Inference(nn.Module):
    """Runs its middle where torch counts nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).relu_()
        z = self.two(y).mul_(2)
        return self.three(z) + y


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (4, 8)),
    "in_place": (InPlace, (2, 3, 9, 9)),
    "chained": (Chained, (2, 3, 9, 9)),
    "perceptron": (Perceptron, (5, 6)),
    "sequences": (Sequences, (4, 4, 8)),
    "shared": (Shared, (4, 8)),
    "decoder": (Decoder, (3, 2, 8)),
    "language": (Language, (2, 5, 8)),
    "nested": (Nested, (4, 8)),
    "appends": (Appends, (4, 8)),
    "sneaky": (Sneaky, (4, 8)),
    "inference": (Inference, (4, 8)),
}


class Bench:
    """A model with reuse, beside one that computes everything."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        shape: tuple[int, ...],
        budget: int = 64 * MIB,
        *,
        fast: bool = False,
    ) -> None:
        self.fast = fast
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build().eval()
            self.batches = [torch.randn(shape) for _ in range(2)]
        plain = copy.deepcopy(model)
        self.said: list[str] = []
        self.ours, self.theirs = self._applier(model), self._applier(plain)
        self.sites = [site.name for site in self.ours.prepared.sites]
        self.reuse = Reuse(self.ours.prepared, budget, self.said.append)

    def _applier(self, model: nn.Module) -> Applier:
        run = lambda m, x=self.batches[0]: m(x.clone())  # noqa: E731
        engine = make_engine(torch.device("cpu")) if self.fast else None
        prepared = prepare(model, run, engine=engine)
        return Applier(prepared, calibrate(prepared, [b.clone() for b in self.batches], run))

    def check(self) -> bool:
        model, x = self.ours.prepared.model, self.batches[0]
        with torch.no_grad():
            return check(self.reuse, self.ours, lambda: model(x), ("search", 0))

    def compare(self, choices: list[int]) -> None:
        recipe = {name: CHOICES[c] for name, c in zip(self.sites, choices, strict=True)}
        self.ours.apply(recipe)
        self.theirs.apply(recipe)
        for i, batch in enumerate(self.batches):
            with torch.no_grad():
                expected = self.theirs.prepared.model(batch.clone())
                with self.reuse.batch(("search", i)):
                    found = self.ours.prepared.model(batch)
            assert same_bits(found, expected)
            assert self.reuse.store.bytes <= self.reuse.store.budget

    def count(self) -> dict[str, int]:
        """Count the calls of every site's layer from here on, those of its hooks included."""
        counts = dict.fromkeys(self.sites, 0)
        for site in self.ours.prepared.sites:
            module = self.ours.prepared.model.get_submodule(site.users[0][0])

            def note(*_: Any, name: str = site.name) -> None:
                counts[name] += 1

            module.register_forward_pre_hook(note)
        return counts


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_results_are_those_of_a_run_without_reuse(name, data):
    bench = Bench(*MODELS[name], budget=data.draw(st.sampled_from([64 * MIB, 12_000])))
    if data.draw(st.booleans()):
        assert bench.check(), bench.said
    n = len(bench.sites)
    current = [0] * n
    for _ in range(data.draw(st.integers(2, 7))):
        for site in data.draw(st.lists(st.integers(0, n - 1), max_size=2)):
            current[site] = data.draw(st.integers(0, len(CHOICES) - 1))
        bench.compare(current)
    assert bench.reuse.on


@pytest.mark.parametrize("budget", [64 * MIB, 12_000])
@pytest.mark.parametrize("name", ["chained", "in_place", "residual", "perceptron"])
def test_results_are_those_of_a_run_without_reuse_where_layers_hand_integers_on(name, budget):
    bench = Bench(*MODELS[name], budget=budget, fast=True)
    assert bench.check(), bench.said
    draw = random.Random(0)
    current = [3] * len(bench.sites)
    bench.compare(current)
    for _ in range(40):
        current[draw.randrange(len(current))] = draw.randrange(len(CHOICES))
        bench.compare(current)
    assert bench.reuse.on
    assert bench.reuse.statistics().hits > 0


def test_what_was_handed_on_depends_on_its_reader():
    bench = Bench(*MODELS["chained"], fast=True)
    assert bench.check(), bench.said
    handed: list[type] = []
    two = bench.ours.prepared.model.two
    two.register_forward_pre_hook(lambda _, args: handed.append(type(args[0])))
    # Stem and one are handed on: what they give depends on their readers, one and two.
    runs = {(2, 2, 2, 2): "stem one two head", (2, 2, 2, 0): "head", (2, 2, 3, 2): "one two head"}
    for choice, expected in {**runs, (2, 2, 2, 1): "head"}.items():
        before = bench.reuse.statistics().misses
        bench.compare(list(choice))
        whole = 2 if "stem" in expected else 1  # the model itself, and the stem's sequential
        ran = bench.reuse.statistics().misses - before
        assert ran == (len(expected.split()) + whole) * len(bench.batches), choice
    assert handed[:2] == [LayerOutput] * 2
    assert handed[4:6] == [Tensor] * 2  # as two computes with a scale of each token then


@pytest.mark.parametrize("name", MODELS)
def test_work_is_saved(name):
    bench = Bench(*MODELS[name])
    assert bench.check(), bench.said
    n = len(bench.sites)
    for last in (0, 1, 2, 1):
        bench.compare([1] * (n - 1) + [last])
    found = bench.reuse.statistics()
    assert found.hits > 0
    assert found.seconds_saved > 0
    assert 0 < found.bytes <= found.budget_bytes


def test_only_what_comes_after_a_change_is_run():
    bench = Bench(*MODELS["residual"])
    counts = bench.count()
    n = len(bench.sites)

    def layers(recipe: list[int]) -> list[int]:
        before = dict(counts)
        bench.compare(recipe)
        return [(counts[s] - before[s]) // 2 for s in bench.sites]

    assert layers([1] * n) == [1] * n
    assert layers([1] * (n - 1) + [2]) == [0] * (n - 1) + [1]
    assert layers([1] * (n - 1) + [0]) == [0] * (n - 1) + [1]
    middle = [1, 1, 1, 0, 1, 1, 1]
    assert layers(middle) == [0, 0, 0, 1, 1, 1, 1]
    assert layers([1] * n) == [0] * (n - 1) + [1]
    assert layers(middle) == [0] * (n - 1) + [1]


def test_a_sequential_needs_no_result_but_the_last():
    bench = Bench(lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))), (100, 64))
    n, counts = 6, bench.count()
    bench.compare([1] * n)
    kept = sorted(bench.reuse.store, key=lambda k: len(k.sites))
    for entry in kept:
        if len(entry.sites) < n - 1:
            bench.reuse.store.drop(entry)
    before = dict(counts)
    bench.compare([1] * (n - 1) + [2])
    assert [counts[s] - before[s] for s in bench.sites] == [0] * (n - 1) + [2]


def test_what_writes_into_its_arguments_always_runs():
    bench = Bench(*MODELS["in_place"])
    assert bench.check()
    assert {c.path for c in bench.reuse._calls if c.opaque} == {"tail"}
    bench = Bench(*MODELS["appends"])
    assert bench.check()
    opaque = {c.path for c in bench.reuse._calls if c.opaque}
    assert opaque == {"layers.0", "layers.1", "layers.2"}


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.two(self.one(x) + self.calls)


class Buffered(nn.Module):
    """The buffer that it changes has no effect that could be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.two(self.one(x))


class Stash(nn.Module):
    """A layer leaves something behind that others read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.head(y) + self.inner.seen


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.linear(x)
        return self.other(self.seen)


class Hooked(nn.Module):
    """Takes the output of a layer inside from a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 8)
        self.found: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        with self.inner[0].register_forward_hook(lambda *call: self.found.append(call[2])):
            return self.head(self.inner(x)) + self.found[-1]


class Spoiling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x.mul_(1.01)))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.dropout(self.one(x), 0.5, training=True))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Counter, "the model keeps something between calls"),
        (Buffered, "the model's weights or buffers change while it runs"),
        (Stash, "the model keeps something between calls"),
        (Hooked, "the model keeps something between calls"),
        (Spoiling, "the model keeps something between calls"),
        (Dropping, "the model draws random numbers"),
    ],
)
def test_models_that_can_not_have_it_are_found(model, reason):
    bench = Bench(model, (4, 8))
    assert not bench.check()
    assert not bench.reuse.on
    assert bench.said == [f"layer outputs are not reused: {reason}"]
    assert bench.reuse.statistics().bytes == 0
    with bench.reuse.batch("key"):
        assert "forward" not in vars(bench.ours.prepared.model)


@pytest.mark.parametrize("mode", ["grad", "autocast", "training"])
def test_nothing_is_kept_where_it_could_not_be_exact(mode):
    bench = Bench(*MODELS["residual"])
    model = bench.ours.prepared.model
    model.train(mode == "training")
    with torch.set_grad_enabled(mode == "grad"), torch.autocast("cpu", enabled=mode == "autocast"):
        for _ in range(2):
            with bench.reuse.batch("key"):
                model(bench.batches[0])
    assert (bench.reuse.statistics().hits, len(bench.reuse.store)) == (0, 0)


def test_a_change_of_the_float_weights_forgets_everything():
    bench = Bench(*MODELS["residual"])
    n = len(bench.sites)
    bench.compare([0] * n)
    for applier in (bench.ours, bench.theirs):
        with torch.no_grad():
            applier.prepared.model.blocks[0][0].bias.add_(1)
    bench.compare([0] * n)
    bench.compare([0] * n)
    assert bench.reuse.on


def test_a_choice_without_a_name_is_never_the_same():
    bench = Bench(*MODELS["residual"])
    prepared = bench.ours.prepared
    first = prepared.sites[0].name
    outputs = []
    for bits in (2, 3):
        bench.ours.apply({first: SiteRecipe(WeightScheme(bits))})
        weight = bench.ours.weight(prepared.sites[0], SiteRecipe(WeightScheme(bits)))
        prepared.switch(first, weight, None)
        assert prepared.slots[first].choice is None
        with torch.no_grad(), bench.reuse.batch("key"):
            outputs.append(prepared.model(bench.batches[0]))
    assert not torch.equal(*outputs)


def test_the_model_is_its_own_outside_and_its_copies_are_theirs():
    bench = Bench(*MODELS["residual"])
    model = bench.ours.prepared.model
    x = bench.batches[0]
    with torch.no_grad(), bench.reuse.batch("key"):
        expected = model(x)
        assert "forward" in vars(model.head)
        twin = copy.deepcopy(model)
        assert twin.head.forward.__self__ is twin.head
        assert torch.equal(twin(x), expected)
        twin.head.double()
        pickled = pickle.loads(pickle.dumps(model))
        assert torch.equal(pickled(x), expected)
    assert model.head.forward is converted_of(model.head)
    assert all(slot.used is None for slot in bench.ours.prepared.slots.values())
    assert deploy(bench.ours.prepared, {}) is not None


def test_an_instance_that_has_a_forward_of_its_own_keeps_it():
    model = Residual().eval()
    forward = model.head.forward
    model.head.forward = lambda x: forward(x) * 2
    bench = Bench(lambda: model, (4, 8))
    mine = vars(bench.ours.prepared.model.head)["forward"]
    with torch.no_grad(), bench.reuse.batch("key"):
        bench.ours.prepared.model(bench.batches[0])
    assert vars(bench.ours.prepared.model.head)["forward"] is mine


def test_data_known_by_their_content():
    bench = Bench(*MODELS["residual"])
    model, counts = bench.ours.prepared.model, bench.count()

    def evaluate(order: list[int], budget: str) -> list[Tensor]:
        with torch.no_grad(), bench.reuse.batch(budget, by_content=True):
            return [model(bench.batches[i].clone()) for i in order]

    first = evaluate([0, 1], "evaluate")
    assert counts[bench.sites[0]] == 2
    for order in ([0, 1], [1, 0], [1, 1]):
        found = evaluate(order, "evaluate")
        assert all(torch.equal(f, first[i]) for f, i in zip(found, order, strict=True))
    assert counts[bench.sites[0]] == 2
    bench.batches[0] += 1
    assert not torch.equal(evaluate([0], "evaluate")[0], first[0])
    assert counts[bench.sites[0]] == 3


class Streaming(nn.Module):
    """Carries its state itself, and is reset by whoever evaluates it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.mix, self.head = nn.GRUCell(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.state = self.mix(self.cell(x, self.state))
        return self.head(self.state)


def test_calls_that_depend_on_calls_before_them_are_found():
    bench = Bench(Streaming, (4, 8))
    model = bench.ours.prepared.model

    def evaluate() -> list[Tensor]:
        model.state = None
        return [model(x) for x in bench.batches]

    with torch.no_grad():
        assert not check(bench.reuse, bench.ours, evaluate, "evaluate", by_content=True)
    assert bench.said == [
        "layer outputs are not reused: a call of the model depends on the calls before it"
    ]


def test_a_sequential_with_a_forward_of_its_own_is_not_taken_for_one():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    model.forward = lambda x: model[2](model[0](x))
    prepared = prepare(model, lambda m: m(torch.ones(2, 8)))
    reuse = Reuse(prepared, MIB)
    x = torch.randn(2, 8)
    with torch.no_grad():
        expected = model(x)
        for _ in range(2):
            with reuse.batch("key"):
                assert torch.equal(model(x), expected)


def test_a_shortage_of_memory_gives_it_back():
    bench = Bench(*MODELS["residual"])
    bench.compare([1] * len(bench.sites))
    bench.reuse.shrink()
    found = bench.reuse.statistics()
    assert (found.bytes, found.budget_bytes) == (0, 32 * MIB)
    assert dataclasses.is_dataclass(found)


def test_no_budget_no_reuse():
    bench = Bench(*MODELS["residual"], budget=0)
    assert not bench.check()
    assert bench.said == []
    bench.compare([1] * len(bench.sites))
    assert bench.reuse.statistics().misses == 0


def test_nothing_more_is_kept_where_it_does_not_pay(monkeypatch):
    """Of a model with large results whose copies take longer than its layers."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).eval()
    x = torch.randn(1024, 64)  # 256 KiB of results for each layer
    prepared = prepare(model, lambda m: m(x))
    applier = Applier(prepared, calibrate(prepared, [x], lambda m, batch=x: m(batch)))
    reuse = Reuse(prepared, 512 * MIB)
    added, add = [], reuse.store.add

    def slow(kept):
        added.append(kept)
        time.sleep(0.05)
        return add(kept)

    monkeypatch.setattr(reuse.store, "add", slow)
    counts = []
    with torch.no_grad():
        for turn in range(40):
            # Always another choice of the first layer: nothing that is kept comes back.
            choice = SiteRecipe(WeightScheme(2 + turn % 7), ActivationScheme(8))
            applier.apply({prepared.sites[0].name: choice})
            expected = prepared.model(x)
            with reuse.batch("search"):
                assert torch.equal(prepared.model(x), expected)
            counts.append(len(added))
    assert counts[0] > 0
    assert counts[-1] < 40 / 2
    assert len(set(counts[20:])) <= 3
