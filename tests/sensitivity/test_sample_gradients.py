"""Gradients of many samples at a time against those of each sample alone."""

import numpy as np
import pytest
import torch
from torch import nn

from autoquant.kernels.engine import make_engine
from autoquant.methods.applier import Applier
from autoquant.methods.correction.bias import BiasCorrection
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.sensitivity import fisher as sensitivity
from autoquant.sensitivity.fisher import Sensitivity, measure_sensitivity
from autoquant.sensitivity.sample_gradients import (
    LATER,
    NESTED,
    TILED,
    Candidates,
    Changes,
    UsesOfWeight,
    WholeGradients,
    listening,
)
from autoquant.spec.recipe import ActivationScheme, WeightScheme
from autoquant.spec.techniques import UNCORRECTED

BIAS = BiasCorrection()
WEIGHTS = (WeightScheme(4), WeightScheme(3, "per_tensor"))
ACTIVATIONS = (ActivationScheme(8), ActivationScheme(4), ActivationScheme(6, "per_token"))


class Images(nn.Module):
    """Every kind of convolution, one layer twice, and a module that writes into its input."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.point = nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv2d(12, 8, 3, groups=4)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.strided = nn.Conv2d(8, 8, 1, stride=2)
        self.line = nn.Conv1d(8, 4, 3, dilation=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        y = self.depthwise(self.stem(x)).relu_()
        y = self.grouped(self.point(y))
        y = self.strided(self.up(y)) + y
        y = self.strided(self.up(y)) * y
        return self.head(self.line(y.flatten(2)).mean(2))


class Texts(nn.Module):
    """Tables of words and of positions, attention, recurrence, and two texts in one batch."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.places = nn.Embedding(6, 8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.step = nn.GRU(8, 8, batch_first=True)
        self.each = nn.Linear(8, 8, bias=False)
        self.nested = nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, one, two):
        ids = torch.cat([one, two])
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        x = x + self.mix(x, x, x, need_weights=False)[0]
        x = self.step(x)[0]
        x = self.each(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        a, b = self.out(x.mean(1)).chunk(2)
        both = torch.stack([a, b], 1).flatten(0, 1)
        a, b = self.nested(both).unflatten(0, (-1, 2)).unbind(1)
        return (a * b)[:, :4]


def made(net, inputs):
    engine = make_engine(torch.device("cpu"), "reference")
    call = (lambda m, b: m(*b)) if isinstance(inputs, tuple) else (lambda m, b: m(b))
    prepared = prepare(net.eval(), lambda m: call(m, inputs), engine=engine)
    applier = Applier(prepared, calibrate(prepared, [inputs], call))
    candidates = {
        s.name: Candidates(
            WEIGHTS, ACTIVATIONS if s.activation else (), BIAS if s.corrects else UNCORRECTED
        )
        for s in prepared.sites
    }
    return applier, candidates, call


def images():
    torch.manual_seed(0)
    return Images(), torch.randn(10, 2, 9, 9)


def texts():
    torch.manual_seed(0)
    return Texts(), (torch.randint(0, 20, (10, 6)), torch.randint(0, 20, (10, 6)))


def rows(applier, candidates, call, inputs, size, kind):
    """Products of the gradient of Σ outputs², a row a sample, ``size`` samples a run."""
    prepared = applier.prepared
    anchor = torch.zeros((), requires_grad=True)
    changes = {n: Changes(prepared.slots[n], c, applier) for n, c in candidates.items()}
    made = {
        n: WholeGradients(c) if kind is None else UsesOfWeight(c, anchor, (kind,))
        for n, c in changes.items()
    }
    count = len(inputs[0]) if isinstance(inputs, tuple) else len(inputs)
    with listening(prepared.model, made):
        for i in range(0, count, size):
            part = (
                tuple(x[i : i + size] for x in inputs)
                if isinstance(inputs, tuple)
                else inputs[i : i + size]
            )
            for probe in made.values():
                probe.begin(size)
            call(prepared.model, part).square().sum().backward()
            for probe in made.values():
                probe.close(last=i + size == count)
    return made


@pytest.mark.parametrize("case", [images, texts])
@pytest.mark.parametrize("size", [1, 5])
def test_uses_of_a_weight_have_its_gradient(case, size):
    net, inputs = case()
    applier, candidates, call = made(net, inputs)
    alone = rows(applier, candidates, call, inputs, 1, None)
    others = {"nested": NESTED, "step.weight_ih_l0": LATER}
    orders = {n: others.get(n, TILED) for n in candidates}
    for order in (TILED, NESTED, LATER):
        together = rows(applier, candidates, call, inputs, size, order)
        for name, probe in together.items():
            if orders[name] != order and size > 1:
                continue
            if name == "places" and size > 1:
                assert probe.mixed  # one row for all samples
                continue
            if name == "each" and size > 1:
                assert probe.agreed(alone[name]) is None  # first and second texts, row by row
                continue
            assert not probe.mixed, name
            for ours, theirs in (
                (probe.weight_rows, alone[name].weight_rows),
                (probe.activation_rows, alone[name].activation_rows),
            ):
                assert len(ours) == len(theirs)
                if not len(theirs):
                    continue
                a, b = np.stack(ours), np.stack(theirs)
                assert np.linalg.norm(a - b) <= 2e-3 * np.linalg.norm(b), name


@pytest.mark.parametrize("case", [images, texts])
def test_samples_together_score_as_they_do_alone(case, monkeypatch):
    net, inputs = case()
    applier, candidates, call = made(net, inputs)
    found = []
    for tried in (3, 0):  # with nothing tried, every sample is run alone
        monkeypatch.setattr(sensitivity, "TRIED", tried or 1)
        sizes = []

        def counted(model, batch, sizes=sizes):
            sizes.append(len(batch[0]) if isinstance(batch, tuple) else len(batch))
            return call(model, batch)

        found.append(
            measure_sensitivity(applier, counted, [inputs], candidates, classes=True, samples=10)
        )
        assert (max(sizes) > 1) == bool(tried)
    together, alone = found
    assert isinstance(together, Sensitivity)
    assert isinstance(alone, Sensitivity)
    for name in candidates:
        for a, b in (
            (together.weights[name], alone.weights[name]),
            (together.activations[name], alone.activations[name]),
        ):
            assert a.keys() == b.keys()
            for scheme in b:
                assert a[scheme].loss == pytest.approx(b[scheme].loss, rel=0.05, abs=1e-12)
                assert a[scheme].error == pytest.approx(b[scheme].error, rel=0.05, abs=1e-12)


def test_a_model_that_mixes_samples_is_run_on_each_alone():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 8)
            self.two = nn.Linear(8, 3)

        def forward(self, x):
            y = self.one(x)
            return self.two(y.roll(1, 0) * y)  # of other samples

    torch.manual_seed(0)
    inputs = torch.randn(12, 4)
    applier, candidates, call = made(Mixing(), inputs)
    sizes = []

    def counted(model, batch):
        sizes.append(len(batch))
        return call(model, batch)

    found = measure_sensitivity(applier, counted, [inputs], candidates, classes=True, samples=12)
    assert isinstance(found, Sensitivity)
    assert found.samples == 12
    assert sizes.count(1) == 12  # the one run of several was not believed
    assert set(sizes) == {1, 3}


def test_a_model_of_one_batch_size_has_gradients():
    class Rigid(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 3)

        def forward(self, x):
            if len(x) > 1:
                raise RuntimeError("one at a time")
            return self.one(x)

    torch.manual_seed(0)
    inputs = torch.randn(6, 4)
    applier, candidates, _ = made(Rigid(), inputs[:1])
    found = measure_sensitivity(
        applier, lambda m, b: m(b), [inputs], candidates, classes=True, samples=6
    )
    assert isinstance(found, Sensitivity)
    assert found.samples == 6
    slots = applier.prepared.slots.values()
    assert all((s.probe, s.listen, s.offset, s.stand_in) == (None,) * 4 for s in slots)


def test_sites_take_turns_where_memory_is_short(monkeypatch):
    net, inputs = images()
    applier, candidates, call = made(net, inputs)
    found = []
    for size in (sensitivity.CHANGED_BYTES, 3000, 1):
        monkeypatch.setattr(sensitivity, "CHANGED_BYTES", size)
        turns = list(sensitivity._turns(candidates, applier.prepared.slots))
        assert [n for group in turns for n in group] == list(candidates)
        scores = measure_sensitivity(applier, call, [inputs], candidates, classes=False, samples=10)
        found.append((len(turns), scores))
    assert found[0][0] == 1 < found[1][0] < found[2][0] == len(candidates)
    for _, other in found[1:]:
        for name in candidates:
            for scheme, score in found[0][1].weights[name].items():
                assert other.weights[name][scheme].loss == pytest.approx(score.loss, rel=0.02)


def test_outputs_of_samples_that_are_run_twice_count_once():
    net, inputs = texts()
    with torch.no_grad():
        outputs = net(*inputs)
    objective = sensitivity._Objective(False, 0)
    for part in (slice(0, 3), slice(0, 10), slice(9, 10)):
        first, size = part.start, part.stop - part.start
        assert objective.of(outputs[part].clone().requires_grad_(), first, size) is not None
    expected = float(outputs.double().square().sum()) / 10
    assert objective.power == pytest.approx(expected, rel=1e-5)
