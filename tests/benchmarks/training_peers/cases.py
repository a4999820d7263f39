"""What is trained: a classifier of the zoo at some bits, from the float model, on unlabelled data.

The data are those that ``autoquant tune --method full`` gets: inputs of the task's
``training_data`` to learn from, the search split to choose by, the confirm split to report of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.models.data import training_pairs
from autoquant.session.session import Session, open_session
from autoquant.study.source import Source
from autoquant.training.schedule import Lessons
from tests.benchmarks.peers.cases import weights_of
from tests.benchmarks.training import HIGH
from tests.benchmarks.zoo import TITLES
from tests.zoo.conftest import HERE, task_module

STEPS, BATCH = 400, 32
"""The steps are those that autoquant takes where nothing is said."""


@dataclass(frozen=True)
class Case:
    """One model at some bits; ``technique`` has the rates that suit it with autoquant."""

    name: str
    model: str
    weights: int
    activations: int
    technique: Distillation = HIGH
    steps: int = STEPS
    batch: int = BATCH

    @property
    def title(self) -> str:
        """What the report calls it."""
        return f"{TITLES[self.model]}, W{self.weights} A{self.activations}"


CASES = {
    case.name: case
    for case in (
        Case("resnext2", "resnext", 2, 2),
        Case("resnext3", "resnext", 3, 3),
        Case("resnext4", "resnext", 4, 4),
    )
}


@dataclass(frozen=True)
class Data:
    """The inputs to learn from and to calibrate with, and the labelled batches of both splits."""

    lessons: Lessons
    calibration: tuple[Tensor, ...]
    search: tuple[tuple[Tensor, Tensor], ...]
    confirm: tuple[tuple[Tensor, Tensor], ...]


def load_float(case: Case, folder: Path) -> nn.Module:
    """Return the float model; what has to be trained first is kept in ``folder``."""
    model: nn.Module = task_module(case.model).load_model(weights_of(case.model, folder))
    return model.eval()


def load_session(case: Case, folder: Path) -> Session:
    """Return autoquant's session of the model."""
    source = Source(str(weights_of(case.model, folder)), str(HERE / f"{case.model}.py"))
    task = source.load_task()
    return open_session(source.load(task), task, torch.device("cpu"))


def data_of(session: Session) -> Data:
    """Return the data that every tool gets."""
    splits = session.splits
    return Data(
        Lessons(tuple(x for x, _ in training_pairs(session.task, splits))),
        tuple(splits.calibrate),
        tuple(splits.search),
        tuple(splits.confirm),
    )


Run = Callable[[Any], Tensor]
"""Inputs of a batch → scores [samples, classes]."""
