"""Models as people bring them: searched, applied, saved, loaded, and held against the untouched.

Each case is treated as a user would treat it, by the public calls alone. What is checked is what
such a user takes for granted: the model that was given is as it was, what was reported is the true
distance between the applied model and an untouched float one, no output is beyond a few percent,
all that stays in float is named, and what is loaded equals what was applied, digit for digit.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import FrozenTrial
from torch import Tensor, nn

import autoquant
from autoquant.errors import UserError
from autoquant.models.data import make_splits
from autoquant.models.metrics import METRICS
from autoquant.models.task import outputs_of
from autoquant.nn.archive import save_archive
from autoquant.optimize.callbacks import Silent
from autoquant.optimize.result import SearchResult
from autoquant.session.apply import write
from autoquant.session.preflight import Preflight
from tests.models.real_life import code, families, outputs, structure, weights, wrapped
from tests.models.real_life.case import Case, noise_to_signal, tensors

SPACE = """
autoquant_space: 1
name: real_life
rules:
  - weight_bits: [8]
    weight_calibration: [mse, max]
    correction: [bias]
    activation_bits: [8]
    activation_calibration: [mse]
"""
TRIALS = 2
CASES = [
    case
    for module in (structure, weights, code, outputs, families, wrapped)
    for case in module.CASES
]


class Heard(Silent):
    """Keeps what the preflight found, and what each trial measured."""

    found: Preflight

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def preflight(self, found: Preflight) -> None:
        self.found = found

    def trial(self, trial: FrozenTrial, best: FrozenTrial | None) -> None:
        self.values[trial.number] = trial.user_attrs["measured"]["value"]


def search(case: Case, model: nn.Module, folder: Path) -> tuple[SearchResult, Heard]:
    """Search a case's model, as a user would."""
    heard = Heard()
    result = autoquant.search(
        model,
        case.task(),
        space=autoquant.SearchSpace.parse(SPACE, "real_life"),
        bits=16,
        trials=TRIALS,
        study=case.name,
        storage=str(folder / "study.journal"),
        out=folder,
        reporter=heard,
        device="cpu",
    )
    return result, heard


def marked(case: Case) -> Any:
    """Return a case as a parameter: slow unless it is one of the quick ones."""
    marks = [] if case.quick else [pytest.mark.slow]
    return pytest.param(case, id=case.name, marks=marks)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Keep what torch says of deprecated things in these models out of the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("case", [marked(c) for c in CASES if c.refused is None])
def test_it_works(case: Case, tmp_path: Path) -> None:
    model, untouched = case.make(), case.make()
    model.eval()
    untouched.eval()
    result, heard = search(case, model, tmp_path)
    applied = autoquant.apply(result.recipe, model, case.task())
    confirm = [inputs for inputs, _ in make_splits(case.task()).confirm]
    expected = [case.run(untouched, inputs) for inputs in confirm]
    ours = [case.run(applied, inputs) for inputs in confirm]

    assert_equal([case.run(model, inputs) for inputs in confirm], expected)  # left as it was
    assert_named(case, heard.found)
    assert_counted(result, heard.found)
    assert_reported(case, result, ours, expected)
    assert_measured(result, heard)
    for mine, theirs in zip(ours, expected, strict=True):
        for (path, x), (_, y) in zip(tensors(mine), tensors(theirs), strict=True):
            for a, b in zip(entries(x, case.column), entries(y, case.column), strict=True):
                assert noise_to_signal(a, b) <= case.noise, path
    assert any(  # and it is another model than the float one
        not torch.equal(x, y)
        for (_, x), (_, y) in zip(tensors(ours), tensors(expected), strict=True)
    )

    recipe = result.recipe
    written = write(applied, recipe, case.task(), tmp_path / "quantized.pt2")
    assert written.kind == case.saved, written.reason
    if written.kind == "pt2":
        program = torch.export.load(written.path).module()
        assert_equal([case.run(program, inputs) for inputs in confirm], ours)
    archive = tmp_path / "quantized.safetensors"
    save_archive(applied, recipe, archive)
    loaded = autoquant.load(archive, case.make(seed=7))  # all numbers come from the archive
    assert_equal([case.run(loaded, inputs) for inputs in confirm], ours)


@pytest.mark.parametrize("case", [marked(c) for c in CASES if c.refused is not None])
def test_it_is_refused_in_one_true_line(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        search(case, case.make(), tmp_path)
    said = str(caught.value)
    assert case.refused is not None
    assert re.search(case.refused, said), said
    assert "\n" not in said
    assert not (tmp_path / "recipe.yaml").exists()


def entries(x: Tensor, axis: int | None) -> tuple[Tensor, ...]:
    """Return an output, or its entries along an axis."""
    return (x,) if axis is None else x.unbind(axis)


def assert_equal(ours: list[Any], theirs: list[Any]) -> None:
    """Assert that two lists of outputs hold the same numbers, digit for digit."""
    for (path, x), (_, y) in zip(tensors(ours), tensors(theirs), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(_bits(x), _bits(y)), f"{path}: off by {(x - y).abs().max()}"


def _bits(x: Tensor) -> Tensor:
    """Return a tensor in which NaN equals NaN."""
    return torch.nan_to_num(x.detach()) if x.is_floating_point() else x


def assert_counted(result: SearchResult, found: Preflight) -> None:
    """Assert that the average width is of all weights, and that of the layers is 8."""
    evidence = result.recipe.evidence
    assert evidence is not None
    layers = sum(site.numel for site in found.sites)
    floats = sum(part.weights for part in found.float_parts)
    assert evidence.of_layers == 8
    average = (8 * layers + 16 * floats) / (layers + floats)
    assert evidence.average_weight_bits == pytest.approx(average)


def assert_named(case: Case, found: Preflight) -> None:
    """Assert that all that stays in float was named, with the reason, and all else is quantized."""
    quantized = {site.name for site in found.sites}
    assert quantized >= set(case.layers)
    said = [(part.name, part.reason) for part in found.float_parts]
    for name, words in case.floats.items():
        assert any(name in n and words in reason for n, reason in said), said


def assert_measured(result: SearchResult, heard: Heard) -> None:
    """Assert that the search went by numbers that the reference confirms."""
    evidence = result.recipe.evidence
    assert evidence is not None
    chosen = next(f.trial for f in result.finalists if f.recipe.key() == result.recipe.key())
    assert heard.values[chosen] == pytest.approx(evidence.search.quantized, rel=0.2, abs=1e-7)


def assert_reported(case: Case, result: SearchResult, ours: list[Any], expected: list[Any]) -> None:
    """Assert that the reported fidelity is the true one, against an untouched float model."""
    evidence = result.recipe.evidence
    assert evidence is not None
    assert evidence.confirm is not None
    mine, theirs = [outputs_of(o) for o in ours], [outputs_of(o) for o in expected]
    if callable(case.metric):
        joined = [row for batch in mine for row in batch]
        assert evidence.confirm.quantized == pytest.approx(case.metric(joined, None), rel=1e-5)
        return
    metric = METRICS.get(evidence.metric)
    true = metric.evidence(list(zip(mine, theirs, strict=True))).score()
    assert math.isfinite(true)
    assert evidence.confirm.quantized == pytest.approx(true, rel=1e-3, abs=1e-12)
