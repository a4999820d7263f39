"""Scores from gradients against the losses that they predict."""

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from autoquant.kernels.engine import make_engine
from autoquant.methods.applier import Applier
from autoquant.methods.correction.bias import BiasCorrection
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.sensitivity.fisher import Candidates, Sensitivity, measure_sensitivity
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.techniques import UNCORRECTED

BIAS = BiasCorrection()
WEIGHTS = tuple(WeightScheme(bits) for bits in (8, 6, 5, 4))
ACTIVATIONS = (ActivationScheme(8), ActivationScheme(6), ActivationScheme(5, "per_token"))


class Net(nn.Module):
    """Convolutions with a ReLU that joins one, a shared input, and layers without bias."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.act = nn.ReLU()
        self.mix = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(72, 32)
        self.gate = nn.Linear(72, 32, bias=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        y = self.mix(self.act(self.stem(x))).relu_().flatten(1)
        return self.head(self.fc(y) * self.gate(y).sigmoid())


def make(net, x, auto=True):
    engine = make_engine(torch.device("cpu"), "auto" if auto else "reference")
    prepared = prepare(net.eval(), lambda m: m(x), engine=engine)
    statistics = calibrate(prepared, [x], lambda m, b: m(b))
    return Applier(prepared, statistics)


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(400, 3, 7, 7)
    with torch.no_grad():
        net.head.weight.mul_(6.0)  # outputs that are sure of something
    applier = make(net, x)
    sites = [s.name for s in applier.prepared.sites]
    candidates = {name: Candidates(WEIGHTS, ACTIVATIONS, BIAS) for name in sites}
    found = measure_sensitivity(
        applier, lambda m, b: m(b), [x[:150], x[150:]], candidates, classes=True, samples=400
    )
    return applier, x, sites, found


def divergence(applier, x, recipe):
    model = applier.prepared.model
    with torch.no_grad():
        applier.to_float()
        clean = F.log_softmax(model(x).double(), 1)
        applier.apply(recipe)
        noisy = F.log_softmax(model(x).double(), 1)
    applier.to_float()
    return float((clean.exp() * (clean - noisy)).sum(1).mean())


def test_the_loss_of_one_change_is_predicted(case):
    applier, x, sites, found = case
    assert isinstance(found, Sensitivity)
    assert found.samples == 400
    predicted, measured = [], []
    for name in sites:
        for weight in WEIGHTS:
            predicted.append(found.weights[name][weight].loss)
            recipe = SiteRecipe(weight, None, BIAS)
            measured.append(divergence(applier, x, {name: recipe}))
        for activation in ACTIVATIONS:
            predicted.append(found.activations[name][activation].loss)
            measured.append(divergence(applier, x, {name: SiteRecipe(None, activation)}))
    assert spearmanr(predicted, measured).statistic > 0.95
    # Below this a divergence is made of float32's own rounding.
    sure = torch.tensor(measured) > 1e-7
    ratios = (torch.tensor(predicted) / torch.tensor(measured))[sure]
    assert 0.7 < float(ratios.median()) < 1.4
    assert bool(((ratios > 0.35) & (ratios < 3.0)).all())


def test_errors_say_how_far_scores_of_other_samples_lie(case):
    applier, x, sites, _ = case
    candidates = {n: Candidates(WEIGHTS, (), UNCORRECTED) for n in sites}

    def once(batch, seed):
        found = measure_sensitivity(
            applier, lambda m, b: m(b), [batch], candidates, classes=True, samples=200, seed=seed
        )
        return [found.weights[n][w] for n in sites for w in WEIGHTS]

    z = [
        (a.loss - b.loss) / (a.error**2 + b.error**2) ** 0.5
        for a, b in zip(once(x[:200], 0), once(x[200:], 1), strict=True)
    ]
    assert 0.3 < float(torch.tensor(z).square().mean().sqrt()) < 2.5


def test_what_is_no_class_score_is_the_noise_of_the_output():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 1)), torch.randn(50, 6)
    applier = make(net, x)
    scheme = WeightScheme(3)
    candidates = {"0": Candidates((scheme,), (), UNCORRECTED)}
    found = measure_sensitivity(
        applier, lambda m, b: m(b), [x], candidates, classes=False, samples=50
    )
    with torch.no_grad():
        clean = net(x)
        applier.apply({"0": SiteRecipe(scheme)})
        change = net(x) - clean
    expected = float(change.square().mean() / clean.square().mean())
    assert found.weights["0"][scheme].loss == pytest.approx(expected, rel=1e-4)


def test_nothing_is_left_behind(case):
    applier = case[0]
    model = applier.prepared.model
    wanted = [p.requires_grad for p in model.parameters()]
    for slot in applier.prepared.slots.values():
        assert (slot.probe, slot.offset) == (None, None)
    assert all(p.grad is None for p in model.parameters())
    assert wanted == [True] * len(wanted)


def test_recurrent_layers_and_tables_have_gradients_too():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(12, 8)
            self.rnn = nn.GRU(8, 16, batch_first=True)
            self.out = nn.Linear(16, 4)

        def forward(self, ids):
            return self.out(self.rnn(self.words(ids))[0][:, -1])

    torch.manual_seed(0)
    ids = torch.randint(0, 12, (120, 5))
    applier = make(Words(), ids)
    sites = [s.name for s in applier.prepared.sites]
    wide = {s.name: ACTIVATIONS if s.activation else () for s in applier.prepared.sites}
    candidates = {n: Candidates(WEIGHTS, wide[n], UNCORRECTED) for n in sites}
    found = measure_sensitivity(
        applier, lambda m, b: m(b), [ids], candidates, classes=True, samples=120
    )
    for name in sites:
        for weight in (WeightScheme(5), WeightScheme(4)):
            measured = divergence(applier, ids, {name: SiteRecipe(weight)})
            assert found.weights[name][weight].loss == pytest.approx(measured, rel=0.6), name


def test_where_there_is_no_gradient_the_reason_is_one_line(case):
    applier, x, sites, _ = case
    candidates = {n: Candidates(WEIGHTS, (), BIAS) for n in sites}

    def without(model, batch):
        with torch.no_grad():
            return model(batch)

    found = measure_sensitivity(applier, without, [x[:8]], candidates, classes=True)
    assert found == "the model's outputs have no gradient"
    found = measure_sensitivity(applier, without, [], candidates, classes=True)
    assert "no calibration data" in found

    def broken(model, batch):
        raise RuntimeError("first\nsecond")

    found = measure_sensitivity(applier, broken, [x[:8]], candidates, classes=True)
    assert found == "gradients can't be taken: first"


def test_what_is_decoded_is_scored_by_the_last_layer(case):
    """The last layer's scores are all there is to a decision: the same losses as with them."""
    applier, x, sites, found = case
    candidates = {name: Candidates(WEIGHTS, ACTIVATIONS, BIAS) for name in sites}
    decided = measure_sensitivity(
        applier,
        lambda m, b: m(b).argmax(1).tolist(),
        [x[:150], x[150:]],
        candidates,
        classes=False,
        samples=400,
    )
    assert isinstance(decided, Sensitivity)
    assert (decided.layer, found.layer) == ("head", "")
    for name in sites:
        for scheme, score in found.weights[name].items():
            assert decided.weights[name][scheme].loss == pytest.approx(score.loss, rel=1e-3)


class Twice(nn.Module):
    """Scores two steps by one head; of the second one nothing is decoded."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = self.body(x)
        return [self.head((1 + 9 * step) * y) for step in range(self.steps)]


def test_what_is_scored_after_the_end_of_a_decoded_sample_does_not_count():
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))

    def scores(steps, decode):
        torch.manual_seed(0)
        applier = make(Twice(steps), x)
        candidates = {n: Candidates(WEIGHTS, (), UNCORRECTED) for n in ("body", "head")}
        found = measure_sensitivity(applier, decode, [x], candidates, classes=False, samples=60)
        assert isinstance(found, Sensitivity)
        assert found.layer == "head"
        return [found.weights[n][w].loss for n in candidates for w in WEIGHTS]

    def ended(model, batch):
        """Return sequences that end with the class that is chosen first: nothing is left."""
        return [[] for _ in model(batch)[0]]

    def both(model, batch):
        return torch.stack([step.argmax(1) for step in model(batch)], 1)

    one, first = scores(1, both), scores(2, ended)
    assert first == pytest.approx(one, rel=1e-3)
    assert scores(2, both) != pytest.approx(one, rel=0.5)
