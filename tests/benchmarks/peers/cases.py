"""The models of the zoo with their data in three parts: to calibrate, to select by, and to test.

A tool sees the first two. For MobileNetV2 they are photos 0 … 127 and 128 … 527 of the shuffle, and
the last 472 are the test; for the other models the second half of the evaluation data is the test.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant import Task
from tests.zoo.conftest import task_module

NAMES = ("mobilenet_v2", "resnext", "g2p", "minilm")
FIRST_TEST_PHOTO = 528
DECODES_BY = {"g2p": "fc"}
CLASSIFIERS = ("mobilenet_v2", "resnext")

Batch = tuple[Any, Any]
"""Inputs and targets."""


@dataclass(frozen=True)
class Case:
    """A float model and its data. ``search_metric`` is what the samplers are to make good."""

    name: str
    model: nn.Module
    forward: Callable[[nn.Module, Any], Any] | None
    calibration: list[Any]
    selection: list[Batch]
    test: list[Batch]
    metric: Any
    search_metric: Any
    higher_is_better: bool | None
    scores: str = ""
    """The layer by whose scores the model decodes, where it does."""

    def run(self, model: nn.Module, inputs: Any) -> Any:
        """Return what ``model`` gives for one batch."""
        if self.forward is not None:
            return self.forward(model, inputs)
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)

    def model_copy(self) -> nn.Module:
        """Return a copy of the float model that a tool may change."""
        return copy.deepcopy(self.model)

    def task(self) -> Task:
        """Return the task that a search gets: it never meets the test data."""
        return Task(
            calibration_data=lambda: iter(self.calibration),
            evaluation_data=lambda: iter(self.selection),
            forward=self.forward,
            metric=self.search_metric,
            higher_is_better=None if isinstance(self.search_metric, str) else self.higher_is_better,
        )

    @property
    def classifies(self) -> bool:
        """Whether outputs are scores of classes."""
        return self.name in CLASSIFIERS

    def with_labels(self) -> list[Batch]:
        """Return the calibration batches with labels that the float model itself gives.

        Of scores the best class; of other numbers these, with noise as large as they are spread:
        at the very outputs a loss has no gradient.
        """
        with torch.no_grad():
            pairs = [(x, self.run(self.model, x)) for x in self.calibration]
        if self.classifies:
            return [(x, y.argmax(-1)) for x, y in pairs]
        spread = torch.cat([y.flatten() for _, y in pairs]).std()
        draw = torch.Generator().manual_seed(0)
        return [(x, y + spread * torch.randn(y.shape, generator=draw)) for x, y in pairs]

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of outputs under such labels."""
        if self.classifies:
            return nn.functional.cross_entropy(outputs, labels)
        return nn.functional.mse_loss(outputs, labels)


def weights_of(name: str, folder: Path) -> Path:
    """Return the weights of a model; what has to be trained first is kept in ``folder``."""
    module = task_module(name)
    if name != "resnext":
        found: Path = module.weights()
        return found
    path = folder / "resnext.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        module.train(part)
        part.replace(path)
    return path


def prepare(name: str, folder: Path, code: str) -> None:
    """Make ready what several runs of a model share; tables that other code made are forgotten."""
    weights_of(name, folder)
    mark = folder / f"code-{name}"
    if not mark.exists() or mark.read_text(encoding="utf-8") != code:
        for kept in (table_path(name, folder), logits_path(name, folder)):
            kept.unlink(missing_ok=True)
        mark.write_text(code, encoding="utf-8")


def table_path(name: str, folder: Path) -> Path:
    """Return where the damages of single layers are kept."""
    return folder / f"layers-{name}.json"


def logits_path(name: str, folder: Path) -> Path:
    """Return where the float model's outputs on the test data are kept."""
    return folder / f"float-{name}.npy"


def load_case(name: str, folder: Path) -> Case:
    """Return a case by name; what has to be trained first is kept in ``folder``."""
    module = task_module(name)
    path = weights_of(name, folder)
    if name == "mobilenet_v2":
        selection = list(module.batches(module.CALIBRATION, FIRST_TEST_PHOTO))
        test = list(module.batches(FIRST_TEST_PHOTO, None))
    else:
        pairs = list(module.evaluation_data())
        half = len(pairs) // 2
        if not half:
            raise ValueError(f"{name}: one batch of evaluation data can't be halved")
        selection, test = pairs[:half], pairs[half:]
    return Case(
        name,
        module.load_model(path).eval(),
        getattr(module, "forward", None),
        list(module.calibration_data()),
        selection,
        test,
        module.metric,
        "kl" if name in CLASSIFIERS else module.metric,
        getattr(module, "higher_is_better", None),
        DECODES_BY.get(name, ""),
    )
