"""Where the model, the task and the space of a search come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.errors import StudyError, UserError
from autoquant.models.files import LoadedModel, load
from autoquant.models.task import Task, data_task, load_task
from autoquant.nn.intake import copied, take
from autoquant.spec.space import SearchSpace, shipped


@dataclass(frozen=True)
class Source:
    """Where model, task and search space come from; what a study keeps to find them again.

    ``space`` is the space's file, None for one that ships with the package.
    """

    model: str
    task: str | None = None
    data: str | None = None
    metric: str | None = None
    trust_pickle: bool = False
    space: str | None = None

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


def source_of(header: Mapping[str, Any]) -> Source:
    """Return where a study's model and task come from."""
    task = header["task"]
    return Source(
        header["model"]["path"] or "",
        task["path"],
        task["data"],
        task["metric"],
        header["model"]["trust_pickle"],
    )


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


def space_header(space: SearchSpace, source: Source) -> dict[str, Any]:
    """Return what a study keeps of its space; one made in Python has no place to be compared."""
    ships = source.space is None and space.name in shipped()
    return {
        "name": space.name,
        "path": absolute(source.space),
        "shipped": ships and SearchSpace.load(space.name).text == space.text,
        "text": space.text,
        "sha256": _sha256(space.text),
    }


def compare(study: str, what: str, then: str, now: str, accept: bool) -> None:
    """Raise StudyError where ``what`` is no longer what the study began with."""
    if then != now and not accept:
        raise StudyError(
            f"study {study}: the {what} has changed since the study began (sha256 {then[:12]}… → "
            f"{now[:12]}…); start a new study, or go on with --accept-changes"
        )


def saved_task(study: str, source: Source) -> Task:
    """Return the task of a study; StudyError where it was one in Python."""
    if source.task is None and source.data is None:
        raise StudyError(
            f"study {study} is of a Task in Python: go on with autoquant.resume(task=…)"
        )
    return source.load_task()


def saved_space(study: str, header: Mapping[str, Any], accept: bool) -> SearchSpace:
    """Return the space as the study keeps it, which its trials are of, accepted changes or not.

    Where it came from a file that is still there, or ships, that must hold the same text.
    """
    saved = header["space"]
    if saved["shipped"] or (saved["path"] and Path(saved["path"]).exists()):
        now = SearchSpace.load(saved["name"] if saved["shipped"] else Path(saved["path"]))
        compare(study, "space", saved["sha256"], _sha256(now.text), accept)
    return SearchSpace.parse(saved["text"], saved["name"])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def absolute(path: str | None) -> str | None:
    """Return ``path`` as it is found from anywhere."""
    return str(Path(path).resolve()) if path else None
