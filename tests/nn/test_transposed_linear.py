"""transformers' Conv1D is a linear layer: known by its name, quantized as nn.Linear is.

The class here is written as theirs is; where transformers is installed, theirs is tried too.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from autoquant.kernels.engine import Engine, make_engine
from autoquant.measure.cost import count_macs
from autoquant.methods.applier import Applier
from autoquant.methods.correction.bias import BiasCorrection
from autoquant.methods.rounding.gptq import GPTQ
from autoquant.methods.rounding.learned_rounding import LearnedRounding
from autoquant.nn.archive import load_archive, save_archive
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.nn.layouts import layout_of
from autoquant.sensitivity.fisher import measure_sensitivity
from autoquant.sensitivity.sample_gradients import Candidates
from autoquant.spec.recipe import ActivationScheme, Recipe, SiteRecipe, WeightScheme


class Conv1D(nn.Module):
    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


Conv1D.__module__ = "transformers.pytorch_utils"


def classes() -> list[type[nn.Module]]:
    try:
        from transformers.pytorch_utils import Conv1D as Theirs
    except ImportError:
        return [Conv1D]
    return [Conv1D, Theirs]


@pytest.fixture(params=classes(), ids=lambda kind: kind.__module__)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """Return a Conv1D and the nn.Linear that computes the same."""
    torch.manual_seed(3)
    ours = request.param(6, 6)  # square, so that nothing but the axis tells rows from columns
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs = nn.Linear(6, 6)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.t())
        theirs.bias.copy_(ours.bias)
    return nn.Sequential(ours), nn.Sequential(theirs)


X = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(2))
BIAS = BiasCorrection()
RECIPES = [
    SiteRecipe(WeightScheme(8), ActivationScheme(8, calibration="mse"), BIAS),
    SiteRecipe(WeightScheme(4, "per_tensor"), ActivationScheme(8, "per_token")),
    SiteRecipe(WeightScheme(3, "per_channel", "asymmetric", "mse")),
    SiteRecipe(WeightScheme(4, calibration="output_mse"), ActivationScheme(6), BIAS),
    SiteRecipe(WeightScheme(3, rounding=LearnedRounding(0.01))),
    SiteRecipe(WeightScheme(3, rounding=GPTQ()), None, BIAS),
]


def applier(model: nn.Module, engine: Engine) -> Applier:
    prepared = prepare(model.eval(), lambda m: m(X), engine=engine)
    return Applier(prepared, calibrate(prepared, [X], lambda m, x: m(x)))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_it_computes_what_the_linear_layer_does(pair, recipe, backend, tmp_path):
    found = []
    for i, model in enumerate(pair):
        architecture = copy.deepcopy(model)
        nn.init.zeros_(architecture[0].weight)
        made = applier(model, make_engine(torch.device("cpu"), backend))
        assert made.prepared.sites[0].layer == ("Conv1D", "Linear")[i]
        assert made.prepared.sites[0].matrix == (6, 6)
        with torch.no_grad():
            done = made.apply({"0": recipe})
            y = made.prepared.model(X)
            if i == 0:
                saved = made.deploy({"0": recipe})
                save_archive(saved, Recipe(done), tmp_path / "model.safetensors")
                loaded = load_archive(tmp_path / "model.safetensors", architecture)
                assert torch.equal(loaded(X), saved(X))
                assert torch.allclose(saved(X), y, atol=1e-5)
                program = torch.export.export(saved, (X,)).module()
                assert torch.equal(program(X), saved(X))
        found.append((y, done["0"].activation, made.weight(made.prepared.sites[0], done["0"])))
    (ours, scheme, weight), (theirs, other_scheme, other_weight) = found
    assert scheme == other_scheme
    assert torch.equal(weight.q, other_weight.q)
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fast_kernels_take_it(pair):
    engine = make_engine(torch.device("cpu"))
    if not engine.backends:
        pytest.skip("this processor has no kernels")
    made = applier(pair[0], engine)
    made.apply({"0": RECIPES[0]})
    with torch.no_grad():
        made.prepared.model(X)
    linear = applier(pair[1], make_engine(torch.device("cpu")))
    linear.apply({"0": RECIPES[0]})
    with torch.no_grad():
        linear.prepared.model(X)
    assert set(engine.shares()) == set(linear.prepared.engine.shares())


def test_profiles_are_those_of_the_linear_layer(pair):
    schemes = (WeightScheme(4), WeightScheme(3, "per_tensor"))
    candidates = {"0": Candidates(schemes, (ActivationScheme(4),), BIAS)}
    scores = []
    for model in pair:
        made = applier(model, Engine())
        batches = [torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
        found = measure_sensitivity(
            made, lambda m, x: m(x).flatten(1), batches, candidates, classes=False
        )
        assert not isinstance(found, str), found
        scores.append([found.weights["0"][s].loss for s in schemes])
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def test_multiplications_are_counted(pair):
    made = applier(pair[0], Engine())
    assert count_macs(made.prepared, lambda m: m(X)).macs == {"0": 5 * 4 * 36}


def test_another_librarys_layer_of_that_name_is_not_known():
    odd = Conv1D(4, 6)
    odd.nf = 3  # not what the weight says

    class Plain(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.nf, self.weight = 4, weight

    Plain.__name__, Plain.__module__ = "Conv1D", "speech"
    for module in (odd, Plain(nn.Parameter(torch.zeros(6, 4)))):
        assert layout_of(module) is None


def test_a_batchnorm_after_it_is_folded_by_its_columns():
    norm = nn.BatchNorm1d(4)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(Conv1D(4, 6), norm).eval()
    x = torch.randn(5, 6)
    before = model(x)
    prepared = prepare(model, lambda m: m(x))
    assert prepared.folded == {"1": "0"}
    assert torch.allclose(model(x), before, atol=1e-5)
