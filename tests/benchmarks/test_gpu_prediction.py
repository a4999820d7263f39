"""What is counted without a GPU is what the layers' sizes say."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn

from autoquant.models.files import LoadedModel
from autoquant.models.task import Task
from autoquant.session import session as sessions
from tests.benchmarks.gpu_models import MODELS, Encoder, ResNet

pytest.importorskip("triton")

from tests.benchmarks import gpu_counting, gpu_prediction
from tests.benchmarks.gpu_counting import (
    ADDING,
    ATTENTION,
    NORMS,
    PRODUCT,
    QUANTIZING,
    Step,
    candidate,
    interpreted,
    steps_of,
)
from tests.benchmarks.gpu_host import forward_ms, of_session, still_engine

BATCH, TOKENS, WIDTH, LAYERS = 4, 16, 32, 2


@pytest.fixture(scope="module")
def encoder() -> list[Step]:
    torch.manual_seed(0)
    few = torch.randint(0, 100, (2, 8))
    with interpreted():
        prepared = candidate(Encoder(LAYERS, WIDTH, 2).eval(), few)
        return steps_of(prepared, torch.Size((BATCH, TOKENS)), few)


def test_launches_of_an_encoder(encoder):
    tokens = BATCH * TOKENS
    products = [s for s in encoder if s.kind == PRODUCT]
    assert len(products) == 6 * LAYERS
    weights = 12 * WIDTH**2 * LAYERS
    assert sum(s.operations for s in products) == 2 * tokens * weights
    attention = [s for s in encoder if s.kind == ATTENTION]
    assert [s.operations for s in attention] == [4 * BATCH * TOKENS**2 * WIDTH] * LAYERS
    assert sum(s.kind == NORMS for s in encoder) == 1 + 2 * LAYERS
    for step in encoder:
        if step.kind == QUANTIZING:
            assert step.written == tokens * WIDTH
            assert step.written * 4 <= step.read <= step.written * 4 + 64


def test_launches_of_a_residual_network():
    few = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with interpreted():
        prepared = candidate(ResNet((1, 1), 16).eval(), few)
        steps = steps_of(prepared, torch.Size((8, 3, 64, 64)), few)
    convolutions = [s for s in steps if s.name == "int8_convolution"]
    sums = [4 * 8 * 64 * 16**2, 4 * 8 * 128 * 8**2]  # bytes of what each block adds and gives
    added = [s for s in convolutions if any(s.read > n and s.written >= n for n in sums)]
    assert len(added) == 2
    assert not any(s.kind == ADDING for s in steps)
    # A stride reads a quarter of the pixels where the kernel has one tap.
    strided = [s for s in convolutions if s.operations == 2 * 8 * 8**2 * 64 * 128]
    assert min(s.read for s in strided) < 8 * 8**2 * 64 + 64 * 128 + 128 * 64


def test_what_is_taken_off_takes_less(encoder):
    rates = gpu_prediction.H200
    whole = rates.ms(encoder)
    once = gpu_prediction.quantized_once(encoder)
    assert len(encoder) - len(once) == 2  # the first query, key and value read one tensor
    assert gpu_prediction.fused(once) < gpu_prediction.fused(encoder) < whole
    assert rates.ms(once) < whole
    text = gpu_prediction.section(MODELS["encoder"], encoder, host=0.5)
    assert f"**{whole:.2f} ms**" in text


def test_programs_that_were_measured():
    assert sum(s.operations for s in gpu_prediction.resnet_by_hand()) == pytest.approx(
        2 * 64 * 4.1e9, rel=0.05
    )
    assert 0 < gpu_prediction.surplus("encoder") < gpu_prediction.surplus("resnet50")
    assert "| 1.53 |" in gpu_prediction.calibration()


def test_nothing_is_launched(encoder):
    with interpreted(), torch.no_grad():
        few = torch.randint(0, 100, (2, 8))
        prepared = candidate(Encoder(1, WIDTH, 2).eval(), few)
        launched = []
        with gpu_counting.counting(lambda name, _: launched.append(name)):
            prepared.model(few)
    assert "int8_matmul" in launched  # nobody collects doubts: int8 is not handed on


def test_what_the_host_spends_around_a_replay():
    assert 0 < forward_ms(replace(MODELS["encoder"], thin=MODELS["encoder"].small), rounds=3) < 100


def test_what_the_host_spends():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(64, 8)
    data = list(zip(x.split(16), model(x).argmax(1).split(16), strict=True))
    task = Task(evaluation_data=lambda: data, metric="accuracy")
    with mock.patch.object(sessions, "make_engine", still_engine):
        loaded = LoadedModel(model, "module", "m", "0" * 64)
        session = sessions.open_session(loaded, task, torch.device("cpu"))
    said: list[str] = []
    session.record(said.append)
    switching, programs, reading = of_session(session, rounds=4)
    assert not said
    assert min(switching, programs, reading) > 0
    assert session.evaluator.programs.recordings == len({len(x) for x, _ in session.splits.search})
