"""Where the model, the task and the space of a search come from."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autoquant.errors import UserError
from autoquant.models.files import LoadedModel, load
from autoquant.models.task import Task, data_task, load_task
from autoquant.nn.intake import copied, take
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


def of_module(model: nn.Module) -> LoadedModel:
    """Return a copy of the user's own module to work on: it is folded and converted in place.

    Raises ModelFileError for a model that can't be searched or copied.
    """
    own = take(model)
    copy = copied(own)
    copy.eval()
    return LoadedModel(copy, "module", type(own).__name__, state_hash(own))


def state_hash(model: nn.Module) -> str:
    """Return a digest of a module's weights, for one that comes from no file."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            for part in _dense_parts(value.detach().cpu()):
                flat = part.contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _dense_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors whose bytes tell ``tensor`` from others: itself, or a sparse one's two."""
    if tensor.layout is torch.strided:
        return (tensor.resolve_conj().resolve_neg(),)
    coordinates = tensor.to_sparse_coo().coalesce()
    return coordinates.indices(), coordinates.values()
