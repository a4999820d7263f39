"""Where the model, the task and the space of a search come from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from autoquant.errors import UserError
from autoquant.models.files import LoadedModel, load
from autoquant.models.task import Task, data_task, load_task
from autoquant.spec.space import shipped


@dataclass(frozen=True)
class Source:
    """Where model, task and search space come from; what a study keeps to find them again.

    ``space`` is the space's file, None for one that ships with the package. Paths are made absolute
    here, before any code of the user's runs, which may change the working directory; the model's is
    empty for a module in Python.
    """

    model: str
    task: str | None = None
    data: str | None = None
    metric: str | None = None
    trust_pickle: bool = False
    space: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "task", "data", "space"):
            path = getattr(self, name)
            if path:
                object.__setattr__(self, name, os.path.abspath(path))

    @property
    def files(self) -> dict[str, str | None]:
        """The files that are read, by what they are called."""
        return {
            "model": self.model or None,
            "task": self.task,
            "data file": self.data,
            "search space": self.space,
        }

    def load_task(self) -> Task:
        """Return the task; UserError where none is given."""
        if self.task is not None:
            return load_task(Path(self.task))
        if self.data is not None:
            return data_task(Path(self.data), self.metric)
        raise UserError("give a task: --task TASK.py, or --data FILE with inputs and targets")

    def load(self, task: Task | None) -> LoadedModel:
        """Return the model."""
        build = None if task is None else task.load_model
        return load(Path(self.model), load_model=build, trust_pickle=self.trust_pickle)


def space_file(space: str | Path) -> str | None:
    """Return the file that a --space names, None where it is the name of one that ships."""
    return None if space in shipped() else str(space)
