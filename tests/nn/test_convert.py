"""Conversion: nothing changes in float, and every site takes effect."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from autoquant.errors import ModelFileError
from autoquant.measure.size import SizeModel, float_bytes
from autoquant.methods.realize import Realizer
from autoquant.nn.archive import load_archive, save_archive
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.nn.sites import find_sites
from autoquant.spec.recipe import ActivationScheme, Recipe, SiteRecipe, WeightScheme


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, stride=2)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.grouped(self.depthwise(self.stem(x)))
        return {"logits": self.head(self.up(x).mean((2, 3)))}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.cross = nn.MultiheadAttention(16, 2, kdim=16, vdim=16, batch_first=True)
        self.out = nn.Linear(16, 11, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids, mask=None):
        x = self.encoder(self.words(ids), src_key_padding_mask=mask)
        return self.out(self.cross(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, 2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(16, 8)
        self.twice = nn.Linear(8, 8)

    def forward(self, x):
        packed = pack_padded_sequence(x, [5, 3], batch_first=True)
        out, _ = self.lstm(packed)
        out, _ = self.gru(out)
        y = self.twice(torch.relu(self.twice(out.data)))
        return y if y.sum() > 1e9 else (y, None)


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding=1)
        self.three = nn.Conv3d(1, 2, (1, 3, 3))

    def forward(self, x):
        return self.three(self.one(x)[:, None, None])


def model_and_input(kind):
    torch.manual_seed(0)
    inputs = {
        Convolutions: (torch.randn(2, 3, 9, 9),),
        Tied: (torch.randint(11, (2, 7)),),
        Recurrent: (torch.randn(2, 5, 6),),
        Sequences: (torch.randn(2, 4, 8),),
    }[kind]
    model = kind().eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
    return model, inputs


KINDS = [Convolutions, Tied, Recurrent, Sequences]


def run_of(inputs):
    def run(model, _=None):
        with torch.no_grad():
            return leaf(model(*inputs))

    return run


def leaf(output):
    if isinstance(output, dict):
        return output["logits"]
    return output[0] if isinstance(output, tuple) else output


def prepared_and_realizer(kind):
    model, inputs = model_and_input(kind)
    run = run_of(inputs)
    prepared = prepare(model, run)
    statistics = calibrate(prepared, [None], run)
    return prepared, Realizer(prepared, statistics), run


def uniform(prepared, bits=8, **scheme):
    return {
        site.name: SiteRecipe(
            WeightScheme(bits, **scheme),
            ActivationScheme(8, calibration="max") if site.activation else None,
        )
        for site in prepared.sites
    }


@pytest.mark.parametrize("kind", KINDS)
def test_preparing_changes_nothing_in_float(kind):
    model, inputs = model_and_input(kind)
    before = run_of(inputs)(copy.deepcopy(model))
    keys = [k for k in model.state_dict() if "stem.1" not in k and k != "stem.0.bias"]
    prepared = prepare(model, run_of(inputs))
    assert torch.allclose(run_of(inputs)(model), before, atol=1e-5)
    assert all(key in model.state_dict() for key in keys)
    assert prepared.model is model


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_accounted_for_once(kind):
    model, _ = model_and_input(kind)
    sites, parts = find_sites(model)
    total = sum(site.numel for site in sites) + sum(part.parameters for part in parts)
    assert total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_site_takes_effect_and_reset_undoes_it(kind, mode):
    prepared, realizer, run = prepared_and_realizer(kind)
    before = run(prepared.model)
    for site in prepared.sites:
        with mode():
            realizer.apply({site.name: SiteRecipe(WeightScheme(2))})
            assert not torch.equal(run(prepared.model), before), site.name
            if site.activation:
                coarse = ActivationScheme(2, calibration="max")
                realizer.apply({site.name: SiteRecipe(None, coarse)})
                assert not torch.equal(run(prepared.model), before), site.name
        realizer.to_float()
        assert torch.equal(run(prepared.model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_are_close_and_switching_is_exact(kind):
    prepared, realizer, run = prepared_and_realizer(kind)
    before = run(prepared.model)
    realizer.apply(uniform(prepared))
    eight = run(prepared.model)
    assert (eight - before).norm() < 0.1 * before.norm()
    realizer.apply(uniform(prepared, 3))
    realizer.apply(uniform(prepared))
    assert torch.equal(run(prepared.model), eight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_a_saved_model_is_the_same_and_as_large_as_counted(kind, granularity, scheme, tmp_path):
    model, _ = model_and_input(kind)
    original = copy.deepcopy(model)
    prepared, realizer, run = prepared_and_realizer(kind)
    size = float_bytes(original)
    bits = 5 if granularity == "per_channel" else 8
    sites = uniform(prepared, bits, granularity=granularity, scheme=scheme)
    done = realizer.apply(sites)
    expected = run(prepared.model)
    deployed = realizer.deploy(sites)
    assert torch.allclose(run(deployed), expected, atol=1e-6)
    assert float_bytes(deployed) == SizeModel(prepared, size).bytes(done)
    path = tmp_path / "model.safetensors"
    save_archive(deployed, Recipe(done, folded=prepared.folded), path)
    for parameter in original.parameters():
        nn.init.zeros_(parameter)
    restored = load_archive(path, original)
    assert torch.equal(run(restored), run(deployed))


def test_an_archive_for_another_architecture_is_one_line(tmp_path):
    prepared, realizer, _ = prepared_and_realizer(Sequences)
    done = realizer.apply(uniform(prepared))
    path = tmp_path / "model.safetensors"
    save_archive(realizer.deploy(done), Recipe(done), path)
    with pytest.raises(ModelFileError, match="another architecture"):
        load_archive(path, model_and_input(Tied)[0])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelFileError, match="cannot read"):
        load_archive(path, model_and_input(Sequences)[0])


def test_tied_weights_are_one_site_and_stay_tied():
    prepared, realizer, _ = prepared_and_realizer(Tied)
    tied = [site for site in prepared.sites if len(site.users) == 2]
    assert [site.name for site in tied] == ["words"]
    realizer.apply({"words": SiteRecipe(WeightScheme(3))})
    model = prepared.model
    assert model.words.weight is model.out.weight
    assert len(model.words.weight.unique()) < 11 * 16


def test_a_layer_that_is_never_used_stays_in_float_and_is_listed():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)}).eval()
    prepared = prepare(model, lambda m: m["used"](torch.ones(1, 3)))
    assert [site.name for site in prepared.sites] == ["used"]
    assert ("unused", "never used on the calibration data") in [
        (part.name, part.reason) for part in prepared.float_parts
    ]


def test_what_has_its_own_forward_or_a_parametrization_is_refused_with_a_reason():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(
        nn.Linear(2, 2), Own(2, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    )
    sites, parts = find_sites(model)
    assert [site.name for site in sites] == ["0"]
    assert any("forward of its own" in part.reason for part in parts)


def test_nothing_to_quantize_says_what_was_found():
    with pytest.raises(ModelFileError, match="1× LayerNorm"):
        prepare(nn.Sequential(nn.LayerNorm(3), nn.ReLU()))


def test_shared_modules_are_one_site():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared).eval()
    prepared = prepare(model, lambda m: m(torch.ones(1, 3)))
    assert [site.name for site in prepared.sites] == ["0"]
