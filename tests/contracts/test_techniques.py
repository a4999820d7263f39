"""What every technique keeps to, whoever wrote it; a new one is known everywhere at once."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import optuna
import pytest
import torch
from torch import Tensor, nn

from autoquant.errors import SpecError
from autoquant.methods.applier import Applier
from autoquant.nn.archive import load_archive, save_archive
from autoquant.nn.calibrate import MissingStatistics, calibrate
from autoquant.nn.convert import Prepared, prepare
from autoquant.observers.output_error import exact_output_error
from autoquant.quant.blocks import to_matrix
from autoquant.samplers.knapsack.mutation import mutate
from autoquant.sensitivity.profile import profile
from autoquant.spec.need import Need
from autoquant.spec.needs import needs_of
from autoquant.spec.recipe import Recipe, SiteRecipe, WeightScheme
from autoquant.spec.recipe_file import dumps, loads
from autoquant.spec.space import SearchSpace
from autoquant.spec.techniques import (
    CORRECTIONS,
    NEAREST,
    ROUNDINGS,
    UNCORRECTED,
    Correction,
    Rounding,
    Technique,
    option,
    technique_of,
)
from autoquant.spec.uniform import uniform
from autoquant.study.parameters import ParameterMap

ALL = [(r, name) for r in (ROUNDINGS, CORRECTIONS) for name in r.names()]
every = pytest.mark.parametrize(("registry", "name"), ALL, ids=[name for _, name in ALL])
roundings = pytest.mark.parametrize("rounding", ROUNDINGS.names())
corrections = pytest.mark.parametrize("correction", CORRECTIONS.names())


def signals(*shape: int) -> Tensor:
    """Return inputs whose neighbours are alike, with a mean."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return x.cumsum(-1) * 0.3 + 0.5


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lstm(x)[0]
        return out


LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(24, 8), lambda: signals(50, 24)),
    "no bias": (lambda: nn.Linear(24, 8, bias=False), lambda: signals(9, 5, 24)),
    "conv1d, grouped": (lambda: nn.Conv1d(4, 6, 5, groups=2), lambda: signals(6, 4, 20)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, padding=1), lambda: signals(4, 3, 8, 8)),
    "conv2d, grouped": (lambda: nn.Conv2d(8, 8, 3, groups=4), lambda: signals(4, 8, 8, 8)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: signals(4, 4, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), lambda: signals(4, 4, 9)),
    "lstm": (Recurrent, lambda: signals(6, 7, 12)),
    "embedding": (lambda: nn.Embedding(10, 12), lambda: torch.arange(10)[None]),
}
kinds = pytest.mark.parametrize("kind", LAYERS)


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(LAYERS[kind][0]()).eval()


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def ready(kind: str) -> tuple[Prepared, Applier, Tensor]:
    x = LAYERS[kind][1]()
    prepared = prepare(model_of(kind), lambda m: m(x))
    return prepared, Applier(prepared, calibrate(prepared, [x], lambda m, b: m(b))), x


def technique(registry: Any, name: str) -> Any:
    return registry.get(name)()


def recipe_of(rounding: str = "nearest", correction: str = "none", **fields: Any) -> SiteRecipe:
    weight = WeightScheme(3, rounding=technique(ROUNDINGS, rounding), **fields)
    return SiteRecipe(weight, None, technique(CORRECTIONS, correction))


@every
def test_a_technique_is_a_value_that_its_name_alone_stands_for(registry, name):
    made = technique(registry, name)
    assert isinstance(made, Rounding if registry is ROUNDINGS else Correction)
    assert made.method == name
    assert made == technique(registry, name)
    assert hash(made) == hash(technique(registry, name))
    assert made == technique_of(registry, name, "here") == technique_of(registry, made.plain(), "")
    assert str(made) == name
    assert made.needs <= frozenset(Need)
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        assert made.checked(field.name, value, "here") == value
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, value)


@every
def test_a_technique_says_what_it_does_in_its_first_line(registry, name):
    kind = registry.get(name)
    first = (inspect.getdoc(kind) or "").splitlines()[0]
    # A dataclass without a docstring is given its signature for one.
    assert not first.startswith(kind.__name__ + "(")
    assert kind.__doc__ != Technique.__doc__
    assert first.endswith(".")
    assert first[0].isupper()


@every
def test_what_it_needs_is_asked_of_calibration(registry, name):
    kind = "rounding" if registry is ROUNDINGS else "correction"
    recipe = recipe_of(**{kind: name})
    assert needs_of(recipe) == registry.get(name).needs
    text = f"autoquant_space: 1\nrules: [{{activation_bits: 16, {kind}: [{name}]}}]"
    prepared, _, _ = ready("linear")
    found = SearchSpace.parse(text, "s").resolve(prepared.sites)
    assert found["0"].needs == registry.get(name).needs


@every
def test_without_data_it_names_the_layer_or_needs_none(registry, name):
    prepared, _, _ = ready("linear")
    recipe = recipe_of(**{"rounding" if registry is ROUNDINGS else "correction": name})
    bare = Applier(prepared, {})
    if not needs_of(recipe):
        assert bare.apply({"0": recipe}) == {"0": recipe}
        return
    with pytest.raises(SpecError, match=r"^0: [^\n]*calibration data[^\n]*$"):
        bare.apply({"0": recipe})


@every
def test_what_calibration_did_not_keep_is_missed_and_never_done_without(registry, name):
    prepared, applier, _ = ready("linear")
    recipe = recipe_of(**{"rounding" if registry is ROUNDINGS else "correction": name})
    enough = {n: s.keep(needs_of(recipe)) for n, s in applier.statistics.items()}
    held, alone = applier.held("0", recipe), Applier(prepared, enough).held("0", recipe)
    assert held is not None
    assert alone is not None
    assert torch.equal(alone.quantized.q, held.quantized.q)
    for need in needs_of(recipe):
        less = {n: s.keep(needs_of(recipe) - {need}) for n, s in applier.statistics.items()}
        with pytest.raises((MissingStatistics, SpecError), match=need.value):
            Applier(prepared, less).apply({"0": recipe})


@kinds
@roundings
@corrections
@pytest.mark.parametrize("calibration", ["max", "output_mse"])
def test_it_is_never_worse_than_nearest_and_always_the_same(
    kind, rounding, correction, calibration
):
    prepared, applier, _ = ready(kind)
    _, again, _ = ready(kind)
    for site in prepared.sites:
        recipe = recipe_of(rounding, correction, calibration=calibration)
        plain = recipe_of("nearest", correction, calibration=calibration)
        held, nearest, twin = (
            a.held(site.name, r) for a, r in ((applier, recipe), (applier, plain), (again, recipe))
        )
        assert held is not None
        assert nearest is not None
        assert twin is not None
        assert torch.equal(held.quantized.q, twin.quantized.q)
        assert torch.equal(held.quantized.qparams.scale, twin.quantized.qparams.scale)
        corrected = applier.calibrated(site.name, recipe).correction
        assert corrected == (recipe.correction if site.corrects else UNCORRECTED)
        moments = applier.statistics[site.name].second_moments(centered=corrected.centers)
        matrix = to_matrix(prepared.slots[site.name].parameter.detach(), site.channel_axis)
        errors = [
            float(exact_output_error(h.quantized.matrix() - matrix, moments))
            for h in (held, nearest)
        ]
        assert errors[0] <= errors[1]
        q = held.quantized.q
        assert int(q.min()) >= -4
        assert int(q.max()) <= 3
        if correction == "none":
            assert held.shift is None


@kinds
@roundings
@corrections
def test_what_is_applied_is_what_is_saved_and_loaded(kind, rounding, correction, tmp_path):
    prepared, applier, x = ready(kind)
    before = run(prepared.model, x)
    done = applier.apply({site.name: recipe_of(rounding, correction) for site in prepared.sites})
    expected = run(prepared.model, x)
    assert not torch.equal(expected, before)
    deployed = applier.deploy(done)
    assert torch.equal(run(deployed, x), expected)
    path = tmp_path / "m.safetensors"
    save_archive(deployed, Recipe(done), path)
    assert torch.equal(run(load_archive(path, model_of(kind)), x), expected)
    # As is the recipe by itself, through its file, with the same data.
    _, other, _ = ready(kind)
    again = other.apply(loads(dumps(Recipe(done))).sites)
    assert again == done
    assert torch.equal(run(other.prepared.model, x), expected)
    other.to_float()
    assert torch.equal(run(other.prepared.model, x), before)


# ---- a technique of somebody else


@dataclass(frozen=True)
class Greedy(Rounding):
    """Move one weight after another a step up or down where that helps."""

    method: ClassVar[str] = "greedy"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.MOMENTS})
    passes: int = option(1, 1, 4)
    share: float = option(1.0, 0.0, 1.0, above=True)

    def fit(self, problem: Any) -> Any:
        """Return the weight after ``passes`` over the first ``share`` of the inputs."""
        best, p = problem.nearest, problem.nearest.qparams
        rows, columns = problem.matrix.shape
        inputs = range(round(self.share * columns))
        for _, row, i in itertools.product(range(self.passes), range(rows), inputs):
            for step in (1, -1):
                q = best.q.clone()
                q[row, i] = (q[row, i] + step).clamp(p.qmin, p.qmax)
                tried = problem.rounded(q)
                if problem.error(tried) < problem.error(best):
                    best = tried
        return best


@dataclass(frozen=True)
class Careless(Rounding):
    """Round everything to 0."""

    method: ClassVar[str] = "careless"

    def fit(self, problem: Any) -> Any:
        """Return no weight at all."""
        return problem.rounded(torch.zeros_like(problem.nearest.q))


@dataclass(frozen=True)
class Stuck(Rounding):
    """Fail as linear algebra does."""

    method: ClassVar[str] = "stuck"

    def fit(self, problem: Any) -> Any:
        """Factor what has no factor."""
        return torch.linalg.cholesky(-torch.eye(2))


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register the techniques above, for one test."""
    before = ROUNDINGS.names()
    with monkeypatch.context() as patch:
        for kind in (Greedy, Careless, Stuck):
            patch.setitem(ROUNDINGS._items, kind.method, kind)
        yield
    assert ROUNDINGS.names() == before


@pytest.mark.usefixtures("added")
def test_a_new_rounding_is_known_to_recipes():
    site = SiteRecipe(WeightScheme(3, rounding=Greedy(2, 0.5)))
    text = dumps(Recipe({"fc": site}))
    assert "rounding: {method: greedy, passes: 2, share: 0.5}" in text
    assert dict(loads(text).sites) == {"fc": site}
    with pytest.raises(SpecError, match="passes: found 5, allowed: an integer ≥ 1, at most 4"):
        loads(text.replace("passes: 2", "passes: 5"))


def test_a_rounding_that_is_not_installed_is_unknown_by_name():
    text = dumps(Recipe({"fc": SiteRecipe(WeightScheme(3, rounding=Greedy()))}))
    with pytest.raises(SpecError, match=r"fc: rounding: unknown method 'greedy'.*: nearest"):
        loads(text)


SPACE = """
autoquant_space: 1
rules:
  - weight_bits: [3, 4]
    activation_bits: 16
    rounding:
      - nearest
      - greedy
      - {method: greedy, passes: [1, 2], share: {low: 0.5, high: 1}}
"""


@pytest.mark.usefixtures("added")
def test_a_new_rounding_is_known_to_spaces_parameters_samplers_and_profiles():
    prepared, applier, _ = ready("linear")
    spaces = SearchSpace.parse(SPACE, "s").resolve(prepared.sites)
    assert spaces["0"].needs == {Need.MOMENTS}
    assert uniform(spaces, 4)["0"].weight.rounding == NEAREST
    mapping = ParameterMap(spaces)
    assert set(mapping.distributions) == {
        "0.weight_bits",
        "0.rounding",
        "0.rounding.greedy 2.passes",
        "0.rounding.greedy 2.share",
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for i in range(20):
        sites = mapping.decode(study.ask(mapping.distributions).params)
        assert mapping.decode(mapping.encode(sites)) == sites
        moved = mutate(sites["0"], spaces["0"], np.random.default_rng(i))
        assert mapping.decode(mapping.encode({"0": moved})) == {"0": moved}
        seen |= {type(sites["0"].weight.rounding), type(moved.weight.rounding)}
    assert seen == {type(NEAREST), Greedy}
    found = profile(prepared, applier.statistics, spaces)
    assert {w.rounding for w in found.weight_damage["0"]} == {NEAREST, Greedy()}
    assert {o.recipe.weight.rounding for o in found.options["0"]} == {Greedy()}


@pytest.mark.usefixtures("added")
def test_a_new_rounding_is_applied_and_kept_only_where_it_is_better():
    prepared, applier, x = ready("linear")
    clean = run(prepared.model, x)
    errors = {}
    for rounding in (NEAREST, Greedy(), Greedy(2), Careless(), Stuck()):
        applier.apply({"0": SiteRecipe(WeightScheme(3, rounding=rounding))})
        errors[rounding] = float((run(prepared.model, x) - clean).square().mean())
    assert errors[Greedy(2)] <= errors[Greedy()] < errors[NEAREST]
    assert errors[Careless()] == errors[Stuck()] == errors[NEAREST]
    with pytest.raises(SpecError, match=r"^0: rounding: greedy needs calibration data"):
        Applier(prepared, {}).apply({"0": SiteRecipe(WeightScheme(3, rounding=Greedy()))})


@dataclass(frozen=True)
class Lift(Correction):
    """Add a little to every bias, whatever the weight."""

    method: ClassVar[str] = "lift"
    by: float = option(0.5, 0.0)

    def shift(self, delta: Any, means: Any) -> Any:
        """Return ``by``, for each channel."""
        assert means is None
        return torch.full((len(delta),), self.by)


def test_a_new_correction_moves_the_bias_and_is_saved(monkeypatch, tmp_path):
    monkeypatch.setitem(CORRECTIONS._items, "lift", Lift)
    prepared, applier, x = ready("linear")
    applier.apply({"0": SiteRecipe(WeightScheme(8))})
    plain = run(prepared.model, x)
    recipe = loads(dumps(Recipe({"0": SiteRecipe(WeightScheme(8), None, Lift(0.25))})))
    done = applier.apply(recipe.sites)
    lifted = run(prepared.model, x)
    torch.testing.assert_close(lifted, plain + 0.25)
    save_archive(applier.deploy(done), Recipe(done), tmp_path / "lifted.safetensors")
    loaded = load_archive(tmp_path / "lifted.safetensors", model_of("linear"))
    assert torch.equal(run(loaded, x), lifted)


PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

from autoquant.spec.techniques import ROUNDINGS, Rounding, option


@ROUNDINGS.register("elsewhere")
@dataclass(frozen=True)
class Elsewhere(Rounding):
    """Comes from another distribution."""

    method: ClassVar[str] = "elsewhere"
    share: float = option(0.5, 0.0, 1.0)
'''
USE = """
import sys
from autoquant.spec.recipe_file import dumps, loads
from autoquant.spec.techniques import ROUNDINGS

assert ROUNDINGS.names()[-1] == "elsewhere", ROUNDINGS.names()
assert "a_plugin" not in sys.modules
recipe = loads("autoquant_recipe: 2\\nlayers: {fc: {weight: {bits: 4}, rounding: elsewhere}}")
assert "a_plugin" in sys.modules
assert "torch" not in sys.modules
assert loads(dumps(recipe)) == recipe
print(recipe.sites["fc"].weight.rounding.plain())
"""


def test_another_distribution_adds_a_rounding_by_an_entry_point(tmp_path: Path):
    (tmp_path / "a_plugin.py").write_text(PLUGIN)
    info = tmp_path / "a_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[autoquant.rounding]\nelsewhere = a_plugin\n")
    program = f"import sys; sys.path.append({str(tmp_path)!r})\n{USE}"
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert child.stderr == ""
    assert child.stdout.strip() == "{'method': 'elsewhere', 'share': 0.5}"
