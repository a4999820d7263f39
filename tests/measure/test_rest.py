"""With its rest in bfloat16 a model is recorded, and its results are kept, as any other."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from autoquant.measure.reuse import Reuse
from autoquant.measure.reuse_check import same_bits
from autoquant.methods.applier import Applier
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from tests.measure.recorder import EagerEngine
from tests.measure.test_programs import CHOICES, Bench
from tests.measure.test_reuse import MODELS as EVERY

MODELS = {name: made for name, made in EVERY.items() if name != "sneaky"}
"""Without the one that hands its numbers to NumPy, which has no bfloat16."""


class LowBench(Bench):
    def _applier(self, model: nn.Module) -> Applier:
        run = lambda m, x=self.batches[0]: m(x.clone())  # noqa: E731
        prepared = prepare(model, run, engine=EagerEngine()).lowered("bf16")
        return Applier(prepared, calibrate(prepared, [b.clone() for b in self.batches], run))


@pytest.mark.parametrize("name", MODELS)
def test_replays_give_what_calls_do(name):
    bench, draw = LowBench(*MODELS[name]), random.Random(0)
    for _ in range(8):
        bench.compare([draw.randrange(len(CHOICES)) for _ in bench.sites])


@pytest.mark.parametrize("name", ["residual", "in_place", "perceptron", "shared"])
def test_a_model_is_one_program_for_every_recipe_of_a_form(name):
    bench, draw = LowBench(*MODELS[name]), random.Random(0)
    for _ in range(6):
        bench.compare([draw.choice((2, 3)) for _ in bench.sites])
    assert bench.programs.recordings == 1
    bench.compare([2] * (len(bench.sites) - 1) + [0])
    assert bench.programs.recordings == 2
    assert not bench.said


@pytest.mark.parametrize("name", MODELS)
def test_results_that_are_given_again_are_what_calls_give(name):
    bench, draw = LowBench(*MODELS[name]), random.Random(1)
    reuse = Reuse(bench.ours.prepared, 1 << 24)
    for _ in range(8):
        bench.apply([draw.randrange(2) for _ in bench.sites])
        for i, batch in enumerate(bench.batches):
            with torch.no_grad():
                expected = bench.theirs.prepared.model(batch.clone())
                with reuse.batch(i):
                    found = bench.model(batch.clone())
            assert same_bits(found, expected)
    assert len(bench.sites) == 1 or reuse.statistics().hits
