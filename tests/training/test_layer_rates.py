"""Rates of layers beside each other: what their powers mean, and that training uses them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.quant.gradients.agreement import rate_multiplier
from autoquant.session.training import train_layers
from autoquant.training.layer_rates import (
    MOST,
    Evidence,
    evidence_of,
    layer_rates,
    needs_evidence,
)
from autoquant.training.train import Moment
from tests.training.models import KINDS, W2A4, everywhere, model_of, opened
from tests.training.test_probes import pupil_of

CURVED, MISMATCHED = Distillation(curvature_power=1.0), Distillation(mismatch_power=1.0)
COSINES = {"a": 1.0, "b": 0.97, "c": -0.5}


def test_noise_of_the_same_size_costs_all_layers_the_same() -> None:
    traces = {"a": 1.0, "b": 4.0, "c": 16.0}
    rates = layer_rates(Evidence(traces, COSINES), CURVED)
    costs = [rates[n] ** 2 * traces[n] for n in traces]
    assert costs == pytest.approx([costs[0]] * 3)
    assert math.prod(rates.values()) == pytest.approx(1.0)


def test_layers_whose_gradient_is_mismatched_are_slower() -> None:
    rates = layer_rates(Evidence({"a": 1.0, "b": 9.0, "c": 3.0}, COSINES), MISMATCHED)
    assert rates == pytest.approx({n: rate_multiplier(c) for n, c in COSINES.items()})


@given(
    st.lists(st.floats(-1.0, 1e6), min_size=1, max_size=8),
    st.floats(-2.0, 2.0),
    st.floats(0.0, 2.0),
)
def test_whatever_is_known_rates_are_within_bounds(
    traces: list[float], curved: float, mismatched: float
) -> None:
    names = [str(i) for i in range(len(traces))]
    evidence = Evidence(dict(zip(names, traces, strict=True)), dict.fromkeys(names, math.nan))
    technique = Distillation(curvature_power=curved, mismatch_power=mismatched)
    for rate in layer_rates(evidence, technique).values():
        assert 1 / MOST <= rate <= MOST


def test_by_default_nothing_is_asked() -> None:
    assert not needs_evidence(Distillation())
    assert needs_evidence(CURVED)
    assert needs_evidence(MISMATCHED)


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_is_found_of_all_layers(kind: str) -> None:
    pupil = pupil_of(opened(kind), W2A4)
    found = evidence_of(pupil)
    assert set(found.traces) == set(found.cosines) == set(pupil.student.learners)
    assert found == evidence_of(pupil)
    assert max(found.traces.values()) > 0


def test_training_uses_them_and_goes_on_with_them(tmp_path: Path) -> None:
    session = opened("mlp")
    sites = everywhere(session, W2A4)
    technique = replace(CURVED, steps=30, weight_rate=0.02, mismatch_power=0.5)
    whole = train_layers(session, sites, technique)
    assert set(whole.layers) == set(session.prepared.slots)
    assert len(set(whole.layers.values())) > 1
    alike = train_layers(session, sites, replace(technique, curvature_power=0.0, mismatch_power=0))
    assert alike.layers == {}
    assert alike.after != whole.after

    class _Killed(BaseException):
        pass

    def kill(moment: Any) -> None:
        if moment.step == 15:
            raise _Killed

    file = tmp_path / "checkpoint"
    session = opened("mlp")
    with pytest.raises(_Killed):
        train_layers(session, sites, technique, watch=kill, checkpoint=file)
    session = opened("mlp")
    resumed = train_layers(session, sites, technique, checkpoint=file)
    assert resumed.layers == whole.layers
    assert resumed.after == whole.after
    assert resumed.sites == whole.sites


def test_a_race_chooses_how_much_the_layers_differ() -> None:
    session = opened("mlp")
    technique = Distillation(steps=27, weight_rate=0.02, rivals=4)
    found = train_layers(session, everywhere(session, W2A4), technique)
    powers = {(r.technique.curvature_power, r.technique.mismatch_power) for r in found.rivals}
    assert (0.0, 0.0) in powers
    assert len(powers) == 4
    assert all(0 <= a <= 1 and 0 <= b <= 1 for a, b in powers)


class Small(nn.Sequential):
    """Has no room for more than four samples with gradients."""

    def __init__(self) -> None:
        super().__init__(*model_of("mlp"))
        self.asked: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.asked.append(len(x))
            if len(x) > 4:
                raise torch.OutOfMemoryError("no room")
        return super().forward(x)


def test_out_of_memory_asks_about_layers_by_fewer_samples() -> None:
    model = Small()
    session = opened(model=model)
    moments: list[Moment] = []
    technique = replace(CURVED, steps=10, batch=16)
    found = train_layers(session, everywhere(session, W2A4), technique, watch=moments.append)
    asked = [f for f in found.findings if f.step == 0 and "layers are asked" in f.done]
    assert [f.done for f in asked] == [f"layers are asked about by batches of {n}" for n in (8, 4)]
    assert moments[0].findings[: len(asked)] == tuple(asked)
    assert set(found.layers) == set(found.sites)
    first = [n for n, _ in itertools.groupby(model.asked)]
    assert first[:3] == [16, 8, 4]
    # Layers are asked about as by batches that had room at once.
    small = replace(technique, batch=4)
    other = opened(model=Small())
    assert train_layers(other, everywhere(other, W2A4), small).layers == found.layers


def test_what_is_asked_about_layers_heeds_who_may_end_it() -> None:
    session = opened("mlp")
    heeded: list[int] = []

    def heed(number: int) -> None:
        heeded.append(number)
        if len(heeded) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_layers(session, everywhere(session, W2A4), CURVED, heed=heed)
    assert heeded == [0] * 20
