"""Reconstruction of whole models: what layers are fitted to, how far models run, what is left."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from autoquant.methods import reconstruct as module
from autoquant.methods.applier import Applier
from autoquant.methods.reconstruct import reconstruct
from autoquant.methods.reconstruction.sequential import Sequential
from autoquant.nn.archive import load_archive, save_archive
from autoquant.nn.calibrate import calibrate, input_rows
from autoquant.nn.convert import prepare
from autoquant.quant.activation import fake_quantize_activation
from autoquant.spec.recipe import (
    FLOAT_SITE,
    ActivationScheme,
    LearnedFile,
    Recipe,
    SiteRecipe,
    WeightScheme,
)
from autoquant.spec.recipe_file import dumps, loads
from autoquant.spec.techniques import UNCORRECTED


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(model, batch):
    with torch.no_grad():
        return model(batch)


def mlp():
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 6)
    )


class Convolutions(nn.Module):
    """One that is depthwise, one beside a residual, and one that is transposed."""

    def __init__(self, transposed=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1, bias=False)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2) if transposed else nn.Identity()
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.point(self.depthwise(x).relu())
        return self.head(self.up(x).mean((2, 3)))


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x):
        return self.last(self.shared(self.shared(self.first(x).relu()).relu()).relu())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.one, self.two = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x):
        return self.two(self.one(self.words(x)).tanh())


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def flat(n):
    """Return batches of correlated inputs with a mean."""
    mixing = numbers(4, n)
    return [numbers(120, 4, seed=i) @ mixing + 0.2 * numbers(120, n, seed=9 + i) + 0.3
            for i in range(3)]  # fmt: skip


def sequences(n):
    return [x.reshape(20, 6, n) for x in flat(n)]


def images():
    return [numbers(8, 3, 8, 8, seed=i).cumsum(-1) * 0.4 + 0.2 for i in range(3)]


def words():
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 20, (20, 5), generator=g) for _ in range(3)]


MODELS = {
    "mlp": (mlp, lambda: flat(16)),
    "convolutions": (Convolutions, images),
    "transposed": (lambda: Convolutions(transposed=True), images),
    "twice": (Twice, lambda: flat(16)),
    "recurrent": (Recurrent, lambda: sequences(12)),
    "words": (Words, words),
    "attention": (Attentive, lambda: sequences(16)),
}
every = pytest.mark.parametrize("kind", MODELS)
W3A8 = SiteRecipe(WeightScheme(3), ActivationScheme(8))


def float_model(kind):
    torch.manual_seed(0)
    return MODELS[kind][0]().eval()


def ready(model, batches, run=run):
    prepared = prepare(model, lambda m: run(m, batches[0]))
    return Applier(prepared, calibrate(prepared, batches, run))


def of(kind):
    batches = MODELS[kind][1]()
    return ready(float_model(kind), batches), batches


def recipe_of(applier, site=W3A8):
    return {site_.name: site for site_ in applier.prepared.sites}


def error(model, clean, batches):
    found = [(run(model, b) - c).square().mean() for b, c in zip(batches, clean, strict=True)]
    return float(sum(found))


class Recorder:
    """Sequential reconstruction that keeps what it was given, by the name of the site."""

    def __init__(self, technique=None):
        self.technique = technique or Sequential(20.0)
        self.given = {}

    def fit(self, site, scheme, weight, quantized, clean, rows):
        self.given[site.name] = (quantized, clean, rows)
        return self.technique.fit(site, scheme, weight, quantized, clean, rows)


def observed(applier):
    return [name for name, slot in applier.prepared.slots.items() if slot.observe is not None]


@every
def test_outputs_are_nearer_than_those_of_nearest_rounding(kind):
    applier, batches = of(kind)
    clean = [run(applier.prepared.model, b) for b in batches]
    sites = recipe_of(applier)
    applier.apply(sites)
    nearest = error(applier.prepared.model, clean, batches)
    names = []
    technique = Sequential(20.0) if kind != "recurrent" else Sequential(20000.0)
    done = reconstruct(applier, sites, batches, run, technique, names.append)
    after = error(applier.prepared.model, clean, batches)
    assert after < (0.8 if kind != "recurrent" else 1.0) * nearest
    # The model is left as what is returned says, and all else of the recipe is as it was.
    again = Applier(applier.prepared, {}, applier.learned)
    assert again.apply(done) == done
    assert error(applier.prepared.model, clean, batches) == after
    kinds = {site.name: site.kind for site in applier.prepared.sites}
    assert set(names) == {n for n, k in kinds.items() if k not in ("embedding", "conv_transpose")}
    for name, site in done.items():
        assert bool(site.learned) == (name in names)
        assert site.weight == sites[name].weight
        assert (site.correction != UNCORRECTED) == (kinds[name] in ("linear", "conv"))
    assert not observed(applier)
    applier.to_float()
    assert error(applier.prepared.model, clean, batches) == 0


@every
def test_it_gives_the_same_every_time(kind):
    found = []
    for _ in range(2):
        applier, batches = of(kind)
        found.append(reconstruct(applier, recipe_of(applier), batches, run, Sequential()))
    assert found[0] == found[1]


@pytest.mark.parametrize("most", [7, 1 << 15])
@pytest.mark.parametrize("kind", ["mlp", "convolutions", "twice", "words"])
def test_layers_are_fitted_to_what_the_quantized_ones_before_them_give(kind, most, monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", most)
    monkeypatch.setattr(module, "ROWS_OF_AN_INPUT", 1)
    applier, batches = of(kind)
    recorder = Recorder()
    done = reconstruct(applier, recipe_of(applier), batches, run, recorder)
    model, deployed = float_model(kind), applier.deploy(done)
    for site in applier.prepared.sites:
        if site.name not in recorder.given:
            continue
        path = site.users[-1][0]
        layer = model.get_submodule(path)
        rows = max(most, site.matrix[1]) // len(batches)
        expected = []
        for owner, activation in ((deployed, done[site.name].activation), (model, None)):
            seen = []
            hook = owner.get_submodule(path).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0].detach().clone())
            )
            for batch in batches:
                run(owner, batch)
            hook.remove()
            if activation is not None:
                seen = [fake_quantize_activation(x, activation, site.kind) for x in seen]
            calls = len(seen) // len(batches)
            parts = [input_rows(x, site, layer, rows) for x in seen]
            while calls * parts[0].shape[1] > rows and parts[0].shape[1] > 1:
                parts = [part[:, ::2] for part in parts]
            expected.append(torch.cat(parts, 1))
        quantized, clean, count = recorder.given[site.name]
        if site.name == "shared":  # its second place sees what it became, not what it was
            quantized, expected[0] = quantized[:, :0], expected[0][:, :0]
        torch.testing.assert_close(quantized, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(clean, expected[1], rtol=1e-5, atol=1e-5)
        assert count >= clean.shape[1]
    assert recorder.given


@every
def test_rows_are_the_same_places_in_both_passes(kind, monkeypatch):
    """With so fine a grid, what a layer sees is nearly the same: of another place it is not."""
    monkeypatch.setattr(module, "MOST_ROWS", 30)
    monkeypatch.setattr(module, "ROWS_OF_AN_INPUT", 1)
    applier, batches = of(kind)
    recorder = Recorder()
    reconstruct(applier, recipe_of(applier, SiteRecipe(WeightScheme(8))), batches, run, recorder)
    for quantized, clean, rows in recorder.given.values():
        assert quantized.shape == clean.shape
        assert clean.shape[1] <= rows
        off = (quantized - clean).norm() / clean.norm()
        assert float(off) < 0.03


def test_no_more_rows_are_kept_than_may_be_however_often_a_layer_is_used(monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 30)
    monkeypatch.setattr(module, "ROWS_OF_AN_INPUT", 1)
    applier, batches = of("twice")
    recorder = Recorder()
    reconstruct(applier, recipe_of(applier), batches, run, recorder)
    for _, clean, _ in recorder.given.values():
        assert clean.shape[1] <= 30


class Counter(nn.Module):
    """Counts how often the model came to it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return x


def test_the_model_runs_no_further_than_needed():
    torch.manual_seed(0)
    first, second, third = Counter(), Counter(), Counter()
    model = nn.Sequential(
        nn.Linear(16, 8), first, nn.Linear(8, 8), second, nn.Linear(8, 4), third
    ).eval()
    batches = flat(16)
    applier = ready(model, batches)
    counters = [m for m in applier.prepared.model.modules() if isinstance(m, Counter)]
    for counter in counters:
        counter.seen.clear()
    reconstruct(applier, recipe_of(applier), batches, run, Sequential())
    # Once in float; then as often as layers behind are fitted.
    assert [len(c.seen) for c in counters] == [3 * 3, 2 * 3, 1 * 3]


def test_a_site_in_float_stays_so():
    applier, batches = of("mlp")
    sites = recipe_of(applier) | {"2": FLOAT_SITE}
    done = reconstruct(applier, sites, batches, run, Sequential(20.0))
    assert done["2"] == FLOAT_SITE
    assert done["0"].learned
    assert done["4"].learned
    weights_only = sites | {"2": SiteRecipe(None, ActivationScheme(8))}
    done = reconstruct(applier, weights_only, batches, run, Sequential(20.0))
    assert not done["2"].learned
    assert done["2"].activation.scale is not None
    # Of a model that is in float altogether nothing is learned, and nothing is wrong.
    in_float = reconstruct(applier, {}, batches, run, Sequential())
    assert in_float == dict.fromkeys(sites, FLOAT_SITE)


def test_a_tuned_recipe_can_be_tuned_again():
    applier, batches = of("mlp")
    clean = [run(applier.prepared.model, b) for b in batches]
    once = reconstruct(applier, recipe_of(applier), batches, run, Sequential(20.0))
    twice = reconstruct(applier, once, batches, run, Sequential(20.0))
    # The first layer sees the very data; so it becomes what it was.
    assert twice["0"] == once["0"]
    applier.apply(recipe_of(applier))
    nearest = error(applier.prepared.model, clean, batches)
    applier.apply(twice)
    assert error(applier.prepared.model, clean, batches) < nearest


class Careful(nn.Module):
    """Goes on whatever a layer raises."""

    def __init__(self, retries=False):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.retries = retries

    def careful(self, layer, x):
        try:
            return layer(x)
        except Exception:
            return layer(x) if self.retries else x.new_zeros(len(x), layer.out_features)

    def forward(self, x):
        for layer in (self.one, self.two, self.three):
            x = self.careful(layer, x)
        return x


class Plain(Careful):
    def careful(self, layer, x):
        return layer(x)


@pytest.mark.parametrize("retries", [False, True])
def test_code_that_swallows_exceptions_changes_nothing(retries):
    found, given = [], []
    for make in (Plain, Careful):
        torch.manual_seed(0)
        batches, recorder = flat(16)[:2], Recorder()
        applier = ready(make(retries).eval(), batches)
        found.append(reconstruct(applier, recipe_of(applier), batches, run, recorder))
        given.append(recorder.given)
        assert not observed(applier)
    # A layer that was called again on the same data may stay as it is, but is fitted to no others.
    assert retries or given[0].keys() == given[1].keys()
    for name, parts in given[1].items():
        assert all(torch.equal(a, b) for a, b in zip(parts[:2], given[0][name][:2], strict=True))
    assert retries or found[0] == found[1]


def test_code_that_raises_another_exception_instead_changes_nothing():
    def translating(model, batch):
        try:
            return run(model, batch)
        except Exception as error:
            raise ValueError("the batch is bad") from error

    found = []
    for how in (run, translating):
        applier, batches = of("mlp")
        found.append(reconstruct(applier, recipe_of(applier), batches, how, Sequential()))
    assert found[0] == found[1]


class Steps(nn.Module):
    """A decoder, which ends where it will."""

    def __init__(self):
        super().__init__()
        self.first, self.step, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x, steps):
        x = self.first(x)
        for _ in range(steps):
            x = self.step(x).tanh()
        return self.last(x)


@pytest.mark.parametrize(
    "steps",
    [
        ([3, 2, 2], [3, 1, 2]),
        ([3, 2, 2], [3, 2, 1]),
        ([3, 2, 2], [2, 2, 2]),
        # As many in all, but not of the same data.
        ([3, 2, 2], [2, 3, 2]),
        ([1, 2, 2], [0, 3, 2]),
    ],
)
def test_a_number_of_steps_that_depends_on_the_data_leaves_the_site_as_it_was(steps):
    of_float, of_quantized = steps
    torch.manual_seed(0)
    rows = flat(16)
    batches = list(range(3))
    calls = []

    def run_steps(model, i):
        calls.append(i)
        now = of_float if len(calls) <= len(batches) else of_quantized
        with torch.no_grad():
            return model(rows[i], now[i])

    applier = ready(Steps().eval(), batches, lambda m, i: m(rows[i], of_float[i]))
    recorder = Recorder()
    sites = recipe_of(applier)
    done = reconstruct(applier, sites, batches, run_steps, recorder)
    assert set(recorder.given) == {"first", "last"}
    assert done["step"] == applier.calibrated("step", sites["step"])
    assert done["first"].learned
    assert done["last"].learned


class Spare(nn.Module):
    """Has a layer that no data come to."""

    def __init__(self):
        super().__init__()
        self.one, self.spare, self.two = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.two(self.spare(x[:0]).sum() + self.one(x))


class Unused(Spare):
    def forward(self, x):
        return self.two(self.one(x))


@pytest.mark.parametrize("make", [Spare, Unused])
def test_a_layer_that_sees_no_data_stays_as_it_is(make):
    batches = flat(16)
    torch.manual_seed(0)
    applier = ready(make().eval(), batches)
    sites = recipe_of(applier, SiteRecipe(WeightScheme(3)))
    done = reconstruct(applier, sites, batches, run, Sequential())
    assert done.get("spare", SiteRecipe()).learned == ""
    assert done["one"].learned
    assert done["two"].learned


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 16)]])
def test_without_data_nothing_is_learned(batches):
    applier, _ = of("mlp")
    sites = recipe_of(applier, SiteRecipe(WeightScheme(3)))
    assert reconstruct(applier, sites, batches, run, Sequential()) == sites


@every
def test_what_is_learned_is_what_is_saved_and_loaded(kind, tmp_path):
    applier, batches = of(kind)
    done = reconstruct(applier, recipe_of(applier), batches, run, Sequential(20.0))
    expected = [run(applier.prepared.model, b) for b in batches]
    recipe = Recipe(done, learned=LearnedFile("r.learned.safetensors", "0" * 64))
    deployed = applier.deploy(done)
    packed = [run(deployed, b) for b in batches]
    # A packed recurrent layer adds up in another order.
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-6 * (kind == "recurrent"))
    path = tmp_path / "m.safetensors"
    save_archive(deployed, recipe, path)
    torch.manual_seed(5)
    loaded = load_archive(path, MODELS[kind][0]().eval())
    assert all(torch.equal(run(loaded, b), p) for b, p in zip(batches, packed, strict=True))
    # As is the recipe by itself, with what was learned and without any data.
    prepared = prepare(float_model(kind), lambda m: run(m, batches[0]))
    other = Applier(prepared, {}, applier.learned)
    assert other.apply(loads(dumps(recipe)).sites) == done
    assert all(
        torch.equal(run(prepared.model, b), e) for b, e in zip(batches, expected, strict=True)
    )


@pytest.mark.parametrize("at", [0, 2, 3, 7])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_observers_are_gone_after_an_exception(at, kind):
    applier, batches = of("mlp")
    calls = []

    def failing(model, batch):
        calls.append(batch)
        if len(calls) > at:
            raise kind("mine")
        return run(model, batch)

    with pytest.raises(kind, match="mine"):
        reconstruct(applier, recipe_of(applier), batches, failing, Sequential())
    assert not observed(applier)
    # And the model is as good as new.
    clean = run(float_model("mlp"), batches[0])
    applier.to_float()
    assert torch.equal(run(applier.prepared.model, batches[0]), clean)
    assert reconstruct(applier, recipe_of(applier), batches, run, Sequential())["4"].learned


def test_it_runs_where_the_users_code_is_in_inference_mode():
    def inferring(model, batch):
        with torch.inference_mode():
            return model(batch)

    found = []
    for how in (run, inferring):
        applier, batches = of("mlp")
        found.append(reconstruct(applier, recipe_of(applier), batches, how, Sequential()))
    assert found[0] == found[1]


def test_the_float_parameters_are_left_alone():
    applier, batches = of("convolutions")
    before = {n: copy.deepcopy(s.parameter) for n, s in applier.prepared.slots.items()}
    reconstruct(applier, recipe_of(applier), batches, run, Sequential())
    for name, slot in applier.prepared.slots.items():
        assert torch.equal(slot.parameter, before[name])
