"""A search whose candidates are replayed finds what one finds whose candidates are called."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoquant.kernels.recording import CannotRecord
from autoquant.measure.programs import Programs
from autoquant.models.task import Task
from autoquant.optimize.callbacks import Silent
from autoquant.optimize.result import SearchResult
from autoquant.optimize.run import search
from autoquant.session import session
from autoquant.spec.space import SearchSpace
from autoquant.study.ledger import Ledger
from autoquant.study.trials import measured
from tests.measure.recorder import EagerEngine, StandIn
from tests.measure.test_reuse import Language, Perceptron

SPACE = """\
autoquant_space: 1
rules:
  - weight_bits: [8, 6, 4, 3]
    weight_scheme: [symmetric, asymmetric]
    activation_bits: [8, 6]
    activation_calibration: [max, mse]
"""


class Classes(nn.Module):
    """A transformer's scores of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.language = Language()
        self.head = nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.language(x)[0].mean(1))


MODELS = {"perceptron": (Perceptron, (6,)), "language": (Classes, (5, 8))}


class Lines(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def searched(
    name: str, recorder: StandIn | None, monkeypatch: pytest.MonkeyPatch, **words: Any
) -> SearchResult:
    def make_engine(device: torch.device, backend: str = "auto") -> EagerEngine:
        engine = EagerEngine()
        engine.recorder = recorder
        return engine

    monkeypatch.setattr(session, "make_engine", make_engine)
    build, shape = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
        x = torch.randn(200, *shape)
    with torch.no_grad():
        y = model(x).argmax(1)
    pairs = list(zip(x.split(30), y.split(30), strict=True))
    task = Task(evaluation_data=lambda: pairs, metric="accuracy")
    space = SearchSpace.parse(SPACE, "mine")
    given = {"trials": 10, "sampler": "tpe", "space": space, "tune": "none"} | words
    return search(model, task, **given)


def rows(study: str) -> list[Any]:
    found = []
    for trial in Ledger.open(study, None).trials():
        values = measured(trial)
        assert values is not None
        found.append((trial.params, values["value"], values["loss"]))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_trials_are_the_same(name, monkeypatch):
    recorder = StandIn()
    searched(name, recorder, monkeypatch, study="replayed")
    searched(name, None, monkeypatch, study="called")
    ours, theirs = rows("replayed"), rows("called")
    assert [r[:2] for r in ours] == [r[:2] for r in theirs]
    for (*_, a), (*_, b) in zip(ours, theirs, strict=True):
        assert math.isclose(a, b, rel_tol=1e-6)
    # One for whole batches and one for the last, smaller one; not one for each candidate.
    assert len(recorder.tapes) in (1, 2)


def test_memory_for_results_is_said_to_be_of_no_use(monkeypatch):
    lines = Lines()
    searched("perceptron", StandIn(), monkeypatch, study="a", memory="1MB", reporter=lines)
    assert any(line.startswith("--memory is not used") for line in lines.said)


def test_what_cannot_be_recorded_is_said_and_searched(monkeypatch):
    def refuse(self: StandIn, work: Any) -> Any:
        raise CannotRecord("operation not permitted when stream is capturing")

    monkeypatch.setattr(StandIn, "record", refuse)
    lines = Lines()
    searched("perceptron", StandIn(), monkeypatch, study="refused", reporter=lines)
    told = [line for line in lines.said if "is not recorded" in line]
    assert told[0] == (
        "the model is not recorded: operation not permitted when stream is capturing"
    )
    assert len(told) == len(set(told))
    monkeypatch.undo()


def test_a_candidate_without_room_for_programs_is_measured_without(monkeypatch):
    def full(self: Programs, *_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Programs, "_record", full)
    lines = Lines()
    found = searched("perceptron", StandIn(), monkeypatch, study="full", reporter=lines)
    assert found.trials["complete"] == 10
    assert "the model is not recorded: there is too little memory" in lines.said
