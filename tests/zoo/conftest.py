"""The zoo: real models with real weights and labelled data; skipped where they are absent."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Case:
    """One zoo model: its task file and the file of its weights."""

    name: str
    task: Path
    module: ModuleType
    model: Path


def task_module(name: str) -> ModuleType:
    """Return a task file as a module."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory):
    """Return a function from a model's name to its Case; it skips where the model is absent."""
    cases: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in cases:
            module = task_module(name)
            try:
                if name == "mobilenet_v2" and not module.photos_path().exists():
                    pytest.skip("the photos are absent: set AUTOQUANT_IMAGENET")
                if name == "resnext":
                    model = tmp_path_factory.mktemp("resnext") / "resnext.pt"
                    module.train(model)
                else:
                    model = module.weights()
            except FileNotFoundError as error:
                pytest.skip(f"{name} is absent: {error}")
            cases[name] = Case(name, HERE / f"{name}.py", module, model)
        return cases[name]

    return get
