"""One way from a recipe to quantized sites, and what it remembers."""

import pytest
import torch
from torch import nn

from autoquant.errors import SpecError, TrialError
from autoquant.methods import applier as module
from autoquant.methods import problem
from autoquant.methods.applier import Applier
from autoquant.methods.rounding.gptq import GPTQ
from autoquant.methods.rounding.learned_rounding import LearnedRounding
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.observers.calibration import activation_range
from autoquant.spec.calibration import ACTIVATION_CALIBRATIONS
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def run(model, _=None):
    with torch.no_grad():
        return model(X)


@pytest.fixture
def applier():
    torch.manual_seed(0)
    prepared = prepare(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), run)
    return Applier(prepared, calibrate(prepared, [None], run))


INT8 = SiteRecipe(WeightScheme(8), ActivationScheme(8))


def test_a_static_scale_comes_from_the_statistics(applier):
    inputs = applier.statistics["0"].inputs
    for scheme in ("symmetric", "asymmetric"):
        for calibration in ACTIVATION_CALIBRATIONS:
            choice = ActivationScheme(6, "per_tensor", scheme, calibration)
            done = applier.apply({"0": SiteRecipe(None, choice)})["0"].activation
            lo, hi = activation_range(inputs, calibration, 6, choice.symmetric)
            width = max(-lo, hi) / 31 if choice.symmetric else (hi - lo) / 63
            assert done.scale == pytest.approx(width, rel=1e-6)
            assert done.zero_point == (0 if choice.symmetric else -32 - round(lo / done.scale))
            assert done.uncalibrated() == choice


def test_what_comes_back_says_all_and_gives_the_same_model_without_data(applier):
    done = applier.apply({"0": INT8, "2": SiteRecipe(None, ActivationScheme(5, "per_token"))})
    expected = run(applier.prepared.model)
    assert done["0"].activation.scale is not None
    assert done["2"].activation.scale is None
    again = Applier(applier.prepared, {})
    assert again.apply(done) == done
    assert torch.equal(run(applier.prepared.model), expected)


def test_sites_that_are_not_named_go_back_to_float(applier):
    before = run(applier.prepared.model)
    applier.apply({"0": INT8, "2": INT8})
    done = applier.apply({"2": SiteRecipe()})
    assert done == {"0": SiteRecipe(), "2": SiteRecipe()}
    assert torch.equal(run(applier.prepared.model), before)
    applier.apply({"0": INT8})
    assert not torch.equal(run(applier.prepared.model), before)
    applier.to_float()
    assert torch.equal(run(applier.prepared.model), before)
    applier.apply({"0": INT8})
    assert not torch.equal(run(applier.prepared.model), before)


def test_only_what_is_new_is_quantized(applier, monkeypatch):
    made, switched = [], []
    original, switch = problem.quantize_weight, type(applier.prepared).switch

    def counted(weight, site, scheme, error=None):
        made.append(site.name)
        return original(weight, site, scheme, error)

    def watched(self, name, *args):
        switched.append(name)
        switch(self, name, *args)

    monkeypatch.setattr(problem, "quantize_weight", counted)
    monkeypatch.setattr(type(applier.prepared), "switch", watched)
    applier.apply({"0": INT8, "2": INT8})
    applier.apply({"0": INT8, "2": SiteRecipe(WeightScheme(4))})
    applier.apply({"0": INT8, "2": INT8})
    assert made == ["0", "2", "2"]
    assert switched == ["0", "2", "2", "2"]


def test_old_weights_are_forgotten_when_there_are_too_many(applier, monkeypatch):
    monkeypatch.setattr(module, "CACHE_BYTES", 300)  # one weight is 256 bytes, the other 128
    weights = {}
    for bits in (2, 3, 4, 5):
        applier.apply({"0": SiteRecipe(WeightScheme(bits))})
        weights[bits] = applier.weight(applier._sites["0"], SiteRecipe(WeightScheme(bits)))
    # Those of one recipe are always kept, and no more than that where they are too many.
    assert [scheme.bits for _, scheme, *_ in applier._weights] == [4, 5]
    for bits, kept in ((4, True), (5, True), (2, False)):
        again = applier.weight(applier._sites["0"], SiteRecipe(WeightScheme(bits)))
        assert (again is weights[bits]) is kept


def test_learning_needs_its_statistics_and_changes_the_weight(applier):
    nearest = SiteRecipe(WeightScheme(3))
    site = applier._sites["2"]
    for rounding in (LearnedRounding(0.05), GPTQ()):
        learned = SiteRecipe(WeightScheme(3, rounding=rounding))
        one, two = applier.weight(site, nearest), applier.weight(site, learned)
        assert not torch.equal(one.q, two.q)
        with pytest.raises(
            SpecError, match=f"2: rounding: {rounding.method} needs calibration data"
        ):
            Applier(applier.prepared, {}).apply({"2": learned})


def test_mistakes_name_the_site(applier):
    with pytest.raises(SpecError, match="layer '9' is not in the model; its 2 layers are 0, 2"):
        applier.apply({"9": INT8})
    with pytest.raises(
        SpecError, match=r"0: weight\.granularity: per_group_32 does not divide the"
    ):
        applier.apply({"0": SiteRecipe(WeightScheme(4, "per_group_32"))})
    with pytest.raises(SpecError, match="0: activation: no scale in the recipe"):
        Applier(applier.prepared, {}).apply({"0": INT8})
    with torch.no_grad():
        applier.prepared.slots["2"].parameter[0, 0] = float("nan")
    with pytest.raises(TrialError, match="2: the weight holds NaN or Inf"):
        applier.apply({"2": INT8})


def test_after_a_mistake_the_next_recipe_is_right(applier):
    applier.apply({"0": INT8, "2": INT8})
    expected = run(applier.prepared.model)
    bad = {"0": SiteRecipe(WeightScheme(2)), "2": SiteRecipe(WeightScheme(4, "per_group_64"))}
    with pytest.raises(SpecError, match="does not divide"):
        applier.apply(bad)
    applier.apply({"0": INT8, "2": INT8})
    assert torch.equal(run(applier.prepared.model), expected)


def test_an_activation_is_left_out_where_none_meets_the_weight():
    ids = torch.tensor([1, 2])
    prepared = prepare(nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 2)), lambda m: m(ids))
    statistics = calibrate(prepared, [ids], lambda m, b: m(b))
    done = Applier(prepared, statistics).apply({"0": INT8, "1": INT8})
    assert done["0"] == SiteRecipe(WeightScheme(8))
    assert done["1"].activation is not None
