"""What every gradient estimator keeps to, whoever wrote it; a new one is known at once."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoquant.errors import SpecError
from autoquant.quant.affine import TINY
from autoquant.quant.trained import FAR, fake_quantize_trained
from autoquant.spec.techniques import (
    ESTIMATORS,
    Estimator,
    Technique,
    offer_of,
    option,
    technique_of,
)

every = pytest.mark.parametrize("name", ESTIMATORS.names())
GRIDS = [(-8, 7), (0, 15), (-128, 127), (-2, 1), (-15, 0), (-3, 12)]
grids = pytest.mark.parametrize(("lo", "hi"), GRIDS)
LARGEST = torch.finfo(torch.float32).max


def variants(name: str) -> list[Estimator]:
    """Return the estimator as its name stands for, and with each option at either end."""
    kind = ESTIMATORS.get(name)
    found = [kind()]
    for field in dataclasses.fields(kind):
        bounds = field.metadata["bounds"]
        ends = [e for e in (bounds.low, min(bounds.high, 1e6)) if bounds.allow(e)]
        found += [kind(**{field.name: type(field.default)(e)}) for e in ends]
    return found


def positions(lo: int, hi: int) -> Tensor:
    """Return points, ends, boundaries and what is next to them, and what is far, tiny or huge."""
    points = torch.arange(lo - 2, hi + 3).float()
    exact = torch.cat([points, points + 0.5, points + 0.25])
    beside = [torch.nextafter(exact, torch.tensor(to)) for to in (math.inf, -math.inf)]
    far = torch.tensor([0.0, -0.0, 1e-45, -1e-45, TINY, 1e-7, 1e4, -1e4, FAR, -FAR])
    return torch.cat([exact, *beside, far])


@every
def test_an_estimator_is_a_value_that_its_name_alone_stands_for(name):
    kind = ESTIMATORS.get(name)
    made = kind()
    assert isinstance(made, Estimator)
    assert made.method == name
    assert made == kind()
    assert hash(made) == hash(kind())
    assert made == technique_of(ESTIMATORS, name, "here")
    assert str(made) == name
    assert made.needs == frozenset()  # no calibration comes before training
    for one in variants(name):
        assert technique_of(ESTIMATORS, one.plain(), "here") == one
        assert offer_of(ESTIMATORS, one.plain(), "here").technique == one
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        assert made.checked(field.name, value, "here") == value
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, value)


@every
def test_spaces_may_search_its_options(name):
    for field in dataclasses.fields(ESTIMATORS.get(name)):
        value, low = getattr(ESTIMATORS.get(name)(), field.name), field.metadata["bounds"].low
        listed = offer_of(ESTIMATORS, {"method": name, field.name: [value, low]}, "here")
        assert listed.axes[0].choices == (value, low)
        span = {"low": low, "high": value}
        ranged = offer_of(ESTIMATORS, {"method": name, field.name: span}, "here")
        assert ranged.axes[0].offers(value)


@every
def test_it_says_what_it_does_and_where_it_comes_from(name):
    kind = ESTIMATORS.get(name)
    first = (inspect.getdoc(kind) or "").splitlines()[0]
    # A dataclass without a docstring is given its signature for one.
    assert not first.startswith(kind.__name__ + "(")
    assert kind.__doc__ != Estimator.__doc__ != Technique.__doc__
    assert first.endswith(".")
    assert first[0].isupper()
    assert "arXiv" in (sys.modules[kind.__module__].__doc__ or "")


@every
@grids
def test_gradients_are_finite_float32_and_of_the_shape_of_the_numbers(name, lo, hi):
    r = positions(lo, hi)
    q = r.clamp(lo, hi).round()
    for estimator in variants(name):
        for g in (torch.ones_like(r), torch.linspace(-3, 2, len(r)), torch.zeros_like(r)):
            passed = estimator.position(g, r, q, lo, hi)
            step = estimator.step(g, r, q, lo, hi, passed)
            for found in (passed, step):
                assert found.shape == r.shape
                assert found.dtype == torch.float32
                assert found.isfinite().all()


@every
@grids
def test_it_changes_no_argument_and_always_says_the_same(name, lo, hi):
    r = positions(lo, hi)
    given = torch.linspace(-3, 2, len(r)), r, r.clamp(lo, hi).round()
    ends = torch.full((len(r),), float(lo)), torch.full((), float(hi)).expand(len(r))
    before = [t.clone() for t in (*given, *ends)]
    for estimator in variants(name):
        passed = estimator.position(*given, *ends)
        kept = passed.clone()
        step = estimator.step(*given, *ends, passed)
        estimator.factor(len(r), *ends)
        assert torch.equal(passed, kept)
        assert all(map(torch.equal, (*given, *ends), before))
        # Ends that are numbers, and another object of the same options, change nothing.
        again = dataclasses.replace(estimator)
        assert torch.equal(again.position(*given, lo, hi), passed)
        assert torch.equal(again.step(*given, lo, hi, passed), step)


@every
@given(scale=st.sampled_from([2.0**-20, 0.5, 4.0, 2.0**20]), seed=st.integers(0, 99))
def test_what_comes_in_as_a_multiple_goes_out_as_that_multiple(name, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(60, generator=generator) * 6
    q, g = r.clamp(-8, 7).round(), torch.randn(60, generator=generator)
    for estimator in variants(name):
        passed = estimator.position(g, r, q, -8, 7)
        more = estimator.position(scale * g, r, q, -8, 7)
        torch.testing.assert_close(more, scale * passed, rtol=1e-6, atol=0)
        step = estimator.step(g, r, q, -8, 7, passed)
        torch.testing.assert_close(
            estimator.step(scale * g, r, q, -8, 7, more), scale * step, rtol=1e-6, atol=0
        )


@every
def test_each_number_passes_by_itself(name):
    r = positions(-8, 7)
    g, q = torch.linspace(-3, 2, len(r)), r.clamp(-8, 7).round()
    order = torch.randperm(len(r), generator=torch.Generator().manual_seed(0))
    for estimator in variants(name):
        whole = estimator.position(g, r, q, -8, 7)
        mixed = estimator.position(g[order], r[order], q[order], -8, 7)
        torch.testing.assert_close(mixed, whole[order], rtol=1e-6, atol=0)


@every
@given(st.lists(st.floats(-128, 127, width=32), min_size=1), st.integers(0, 2**31))
@settings(deadline=None)
def test_it_rounds_to_a_neighbour_and_to_the_nearest_outside_training(name, numbers, seed):
    r = torch.tensor([*numbers, -128.0, 0.0, 127.0])
    for estimator in variants(name):
        assert torch.equal(estimator.round(r.clone(), None), r.round())
        drawn = [estimator.round(r.clone(), torch.Generator().manual_seed(seed)) for _ in "ab"]
        assert torch.equal(*drawn)
        assert torch.equal(drawn[0], drawn[0].round())
        assert ((drawn[0] - r).abs() < 1).all()
        assert estimator.draws or torch.equal(drawn[0], r.round())


EXTREMES = {
    "huge": [LARGEST, -LARGEST, 1e38, -1e30],
    "infinite": [math.inf, -math.inf, 1.0, 0.0],
    "tiny": [TINY, -TINY, 1e-37, 0.0],
    "denormal": [1e-45, -1e-45, 1e-40, 0.0],
    "constant": [0.7] * 4,
    "zeros": [0.0, -0.0, 0.0, 0.0],
    "boundaries": [0.5, -8.5, 7.5, -0.5],
}


@every
@pytest.mark.parametrize("numbers", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_trained_has_finite_gradients_always_the_same(name, numbers, dtype):
    x = torch.tensor([numbers, numbers]).to(dtype).requires_grad_()
    for estimator, log_scale, zero_point in itertools.product(
        variants(name), [-200.0, -87.0, -3.0, 0.0, 20.0, 60.0], [0, 7, -8]
    ):
        log = torch.full((2, 1), log_scale, requires_grad=True)
        before = x.detach().clone(), log.detach().clone()
        found = []
        for _ in range(2):
            y = fake_quantize_trained(
                x, log, zero_point, -8, 7, estimator, torch.Generator().manual_seed(1)
            )
            by_x, by_scale = torch.autograd.grad(y.sum(), (x, log))
            found.append((y.detach(), by_x, by_scale))
        assert all(map(torch.equal, *found))
        assert (y.dtype, by_x.dtype, by_scale.dtype) == (dtype, dtype, torch.float32)
        assert (y.shape, by_x.shape, by_scale.shape) == (x.shape, x.shape, log.shape)
        assert all(t.isfinite().all() for t in (y, by_x, by_scale))
        assert torch.equal(x, before[0])
        assert torch.equal(log, before[1])


WITHOUT_TORCH = """
import sys
from autoquant.spec.techniques import ESTIMATORS

print([ESTIMATORS.get(name).method for name in ESTIMATORS.names()])
print([m for m in ("torch", "optuna", "numpy") if m in sys.modules])
"""


def test_estimators_are_known_without_torch():
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False
    )
    assert child.stderr == ""
    assert child.stdout.splitlines() == [str(list(ESTIMATORS.names())), "[]"]


# ---- an estimator of somebody else


@dataclass(frozen=True)
class Fading(Estimator):
    """Let gradients fade towards the ends of the grid."""

    method: ClassVar[str] = "fading"
    share: float = option(0.5, 0.0, 1.0)

    def position(self, g: Any, r: Any, q: Any, lo: Any, hi: Any) -> Any:
        """Return less of ``g`` the further ``r`` is from the middle."""
        far = ((2 * r - lo - hi) / (hi - lo)).abs()
        return g * (1 - self.share * far).clamp(min=0)


def test_a_new_estimator_is_known_by_name_and_trains(monkeypatch):
    before = ESTIMATORS.names()
    with monkeypatch.context() as patch:
        patch.setitem(ESTIMATORS._items, "fading", Fading)
        assert "fading" in ESTIMATORS.names()
        made = technique_of(ESTIMATORS, {"method": "fading", "share": 1}, "here")
        assert made == Fading(1.0)
        rule = r"^here: estimator: share: found 2, allowed: a number ≥ 0, at most 1$"
        with pytest.raises(SpecError, match=rule):
            technique_of(ESTIMATORS, {"method": "fading", "share": 2}, "here")
        x = torch.tensor([-0.5, 3.0, 7.0]).requires_grad_()
        log_scale = torch.zeros((), requires_grad=True)
        fake_quantize_trained(x, log_scale, 0, -8, 7, made).sum().backward()
        torch.testing.assert_close(x.grad, torch.tensor([1, 1 - 7 / 15, 0]))
        expected = 10 + 0.5 - 3 * (1 - 7 / 15)
        assert float(log_scale.grad) == pytest.approx(expected)
    assert ESTIMATORS.names() == before
    with pytest.raises(SpecError, match=r"here: estimator: unknown method 'fading'"):
        technique_of(ESTIMATORS, "fading", "here")


PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

from autoquant.spec.techniques import ESTIMATORS, Estimator, option


@ESTIMATORS.register("elsewhere")
@dataclass(frozen=True)
class Elsewhere(Estimator):
    """Comes from another distribution."""

    method: ClassVar[str] = "elsewhere"
    share: float = option(0.5, 0.0, 1.0)
'''
USE = """
import sys
from autoquant.spec.techniques import ESTIMATORS, technique_of

assert ESTIMATORS.names()[-1] == "elsewhere", ESTIMATORS.names()
assert "a_plugin" not in sys.modules
print(technique_of(ESTIMATORS, "elsewhere", "here").plain())
assert "a_plugin" in sys.modules
assert "torch" not in sys.modules
"""


def test_another_distribution_adds_an_estimator_by_an_entry_point(tmp_path: Path):
    (tmp_path / "a_plugin.py").write_text(PLUGIN)
    info = tmp_path / "a_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[autoquant.estimator]\nelsewhere = a_plugin\n")
    program = f"import sys; sys.path.append({str(tmp_path)!r})\n{USE}"
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert child.stderr == ""
    assert child.stdout.strip() == "{'method': 'elsewhere', 'share': 0.5}"
