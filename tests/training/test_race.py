"""Sets of rates race: bad ones cost few steps, and the best of the longest round is taken."""

from __future__ import annotations

import math
from dataclasses import replace

import optuna
import pytest

from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.session.training import train_layers
from autoquant.training.race import FACTOR, RATIO, SPREAD, race, rounds_of
from tests.training.models import everywhere, opened

USUAL = Distillation(steps=270, rivals=16)


def valley(best: float):
    """Return a loss that is least at ``best`` times the usual rate, and what was asked of it."""
    asked: list[Distillation] = []

    def attempt(technique: Distillation) -> float:
        asked.append(technique)
        off = math.log(technique.scale_rate / (USUAL.scale_rate * best))
        return 1.0 + off * off + 10.0 / technique.steps

    return attempt, asked


@pytest.mark.parametrize("best", [0.2, 1.0, 5.0])
def test_it_finds_the_rates_that_lose_least(best: float) -> None:
    attempt, asked = valley(best)
    found, rivals = race(USUAL, attempt, seed=0)
    assert abs(math.log(found.scale_rate / (USUAL.scale_rate * best))) < 0.7
    assert found == replace(
        USUAL,
        weight_rate=found.weight_rate,
        scale_rate=found.scale_rate,
        bias_rate=found.bias_rate,
        activation_rate=found.activation_rate,
        curvature_power=found.curvature_power,
        mismatch_power=found.mismatch_power,
    )
    assert len(rivals) == USUAL.rivals
    assert asked[0] == replace(USUAL, steps=10)  # the usual ones are among them
    for rival in rivals:
        every = rival.technique.scale_rate / USUAL.scale_rate
        weight = rival.technique.weight_rate / USUAL.weight_rate / every
        assert every * 1.001 >= 1 / SPREAD
        assert every <= SPREAD * 1.001
        assert weight * 1.001 >= 1 / RATIO
        assert weight <= RATIO * 1.001


def test_bad_ones_cost_few_steps() -> None:
    attempt, asked = valley(1.0)
    _, rivals = race(USUAL, attempt, seed=1)
    assert rounds_of(270) == [10, 30, 90]
    counts = {steps: sum(r.steps == steps for r in rivals) for steps in rounds_of(270)}
    assert counts[10] > counts[90]
    assert sum(t.steps for t in asked) < USUAL.rivals * 90 / 2
    longest = [r.loss for r in rivals if r.steps == 90]
    assert min(longest) < min(r.loss for r in rivals if r.steps == 10)


def test_it_is_the_same_each_time_and_leaves_the_log_as_it_was() -> None:
    before = optuna.logging.get_verbosity()
    first, second = (race(USUAL, valley(2.0)[0], seed=3)[0] for _ in range(2))
    assert first == second
    assert optuna.logging.get_verbosity() == before


def test_where_nothing_is_a_number_the_rates_are_the_usual_ones() -> None:
    found, rivals = race(USUAL, lambda _: math.nan, seed=0)
    assert found == USUAL
    assert all(math.isinf(r.loss) for r in rivals)
    assert rounds_of(1) == [1]
    assert len(rounds_of(FACTOR)) == 1


def test_training_takes_the_rates_that_won(tmp_path) -> None:
    technique = Distillation(steps=30, rivals=4)
    file = tmp_path / "c.safetensors"
    found = train_layers(opened("mlp"), everywhere(opened("mlp")), technique, checkpoint=file)
    assert len(found.rivals) == 4
    longest = max(r.steps for r in found.rivals)
    best = min((r for r in found.rivals if r.steps == longest), key=lambda r: r.loss)
    assert found.technique == best.technique
    # Gone on with, it does not race again.
    again = train_layers(opened("mlp"), everywhere(opened("mlp")), technique, checkpoint=file)
    assert not again.rivals
    assert again.technique == found.technique
    assert set(again.learned) == set(found.learned)
