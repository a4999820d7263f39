"""A corrected bias keeps the mean output, wherever it is computed."""

import pytest
import torch
from torch import nn

from autoquant.errors import SpecError
from autoquant.kernels.engine import make_engine
from autoquant.methods.applier import Applier
from autoquant.methods.correction.bias import BiasCorrection, bias_shift
from autoquant.nn.archive import load_archive, save_archive
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.spec.recipe import ActivationScheme, Recipe, SiteRecipe, WeightScheme
from autoquant.spec.techniques import UNCORRECTED

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "no bias": (lambda: nn.Linear(6, 4, bias=False), (5, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1, bias=False), (3, 4, 9)),
    "conv2d": (
        lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect"),
        (3, 3, 7, 8),
    ),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (3, 4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 3)),
}
BIAS = BiasCorrection()
CORRECTED = SiteRecipe(WeightScheme(3), None, BIAS)


def make(kind, engine=None):
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]
    x = torch.rand(shape) * 2 + 0.5

    def run(model, _=None):
        with torch.no_grad():
            return model(x)

    prepared = prepare(nn.Sequential(layer()).eval(), run, engine=engine)
    return prepared, Applier(prepared, calibrate(prepared, [None], run)), run


def means(y, kind):
    return (
        y.flatten(0, -2).mean(0)
        if "linear" in kind or kind == "no bias"
        else (y.transpose(0, 1).flatten(1).mean(1))
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_the_mean_output_of_every_channel_is_that_of_the_float_layer(kind):
    prepared, applier, run = make(kind)
    expected = means(run(prepared.model), kind)
    applier.apply({"0": CORRECTED})
    assert torch.allclose(means(run(prepared.model), kind), expected, atol=1e-5)
    plain = SiteRecipe(WeightScheme(3))
    applier.apply({"0": plain})
    assert not torch.allclose(means(run(prepared.model), kind), expected, atol=1e-3)
    applier.to_float()
    assert torch.equal(means(run(prepared.model), kind), expected)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv2d", "depthwise"])
def test_kernels_compute_with_the_corrected_bias(kind):
    recipe = SiteRecipe(WeightScheme(4), ActivationScheme(8), BIAS)
    fast, applier, run = make(kind, make_engine(torch.device("cpu"), "auto"))
    applier.apply({"0": recipe})
    slow, other, _ = make(kind)
    other.apply({"0": recipe})
    a, b = run(fast.model), run(slow.model)
    assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_saved_model_carries_it(kind, tmp_path):
    prepared, applier, run = make(kind)
    done = applier.apply({"0": CORRECTED})
    expected = run(prepared.model)
    deployed = applier.deploy(done)
    assert torch.equal(run(deployed), expected)
    path = tmp_path / "m.safetensors"
    save_archive(deployed, Recipe(done), path)
    again = load_archive(path, nn.Sequential(LAYERS[kind][0]()))
    assert torch.equal(run(again), expected)


def test_it_needs_data_and_a_layer_with_a_mean():
    prepared, _, _ = make("linear")
    with pytest.raises(SpecError, match="0: correction: a corrected bias needs calibration"):
        Applier(prepared, {}).apply({"0": CORRECTED})
    table = prepare(nn.Sequential(nn.Embedding(5, 3)), lambda m: m(torch.tensor([1])))
    done = Applier(table, {}).apply({"0": CORRECTED})
    assert done["0"].correction == UNCORRECTED


def test_a_user_sees_the_bias_that_counts():
    prepared, applier, _ = make("linear")
    own = prepared.model[0]._parameters["bias"]
    assert prepared.model[0].bias is own
    applier.apply({"0": CORRECTED})
    assert not torch.equal(prepared.model[0].bias, own)


def test_the_shift_is_the_mean_error_group_by_group():
    delta, mean = torch.randn(6, 4), torch.randn(3, 4)
    expected = [-(delta[c] @ mean[c // 2]) for c in range(6)]
    assert torch.allclose(bias_shift(delta, mean), torch.stack(expected), atol=1e-6)
