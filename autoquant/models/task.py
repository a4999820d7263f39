"""Tasks: what a model is for, as Python functions, from a task file or from a data file."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from autoquant.errors import TaskError
from autoquant.models.datafile import read_data_file
from autoquant.models.direction import name_of, sounds_smaller
from autoquant.models.metrics import METRICS
from autoquant.models.taskfiles import new_module, run
from autoquant.models.trees import CONSTANTS, batch_size, take
from autoquant.models.usercode import guarded
from autoquant.registry import unknown

FUNCTIONS = (
    "augment", "training_loss", "forward", "evaluate", "evaluate_confirm", "load_model"
)  # fmt: skip
"""Parts of a task that are functions, with arguments."""

DATA_BATCH = 64
"""Samples a batch where the data comes from a file."""
NEAR = 0.85
"""How alike a name is to one of a task's to be taken for a slip: ``train_data`` is .87 of one,
``training_words`` .82 of another."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What a model is for: its data and its metric.

    Either ``evaluation_data`` with a ``metric`` (none: fidelity to the float model), or
    ``evaluate``. Data may be given as functions without arguments or as iterables such as lists
    and DataLoaders; a batch is a tensor, a tuple or dict of tensors, or a list with one item a
    sample, and samples lie along the first dimension. Raises TaskError for parts that are missing
    or contradict each other.

    - ``calibration_data()``: batches of inputs.
    - ``training_data()``: batches of inputs to train with, where a recipe is trained; without it,
      the calibration data. ``augment(inputs)``: other inputs of a batch, as photos mirrored or cut;
      what it draws, it draws from torch, whose state is seeded for each step.
    - ``training_loss(outputs, targets)``: a tensor with one number, which training makes small
      beside how far outputs are from the float model's; ``training_data`` then has batches of
      (inputs, targets).
    - ``evaluation_data()``: batches of (inputs, targets); without targets (inputs, None), or
      inputs that are not themselves two things in a tuple or list.
    - ``forward(model, inputs)``: calls the model; see ``run_forward`` for what happens without.
    - ``metric``: a name in METRICS, or a function of all outputs and all targets.
    - ``higher_is_better``: for a function and for ``evaluate``; true where it is not given, which
      it must be where the function's name says loss, error or the like.
    - ``evaluate(model)``, ``evaluate_confirm(model)``: a number, for everything that is no
      function of outputs and targets; the second one on data that the first does not use.
    - ``load_model(path)``: makes the model of a state_dict file.
    - ``source``, ``sha256``: the file that it came from and its content; "" for Python objects.
    """

    calibration_data: Callable[[], Iterable[Any]] | None = None
    evaluation_data: Callable[[], Iterable[Any]] | None = None
    training_data: Callable[[], Iterable[Any]] | None = None
    augment: Callable[[Any], Any] | None = None
    training_loss: Callable[[Any, Any], Tensor] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    metric: str | Callable[[Any, Any], float] | None = None
    higher_is_better: bool | None = None
    evaluate: Callable[[nn.Module], float] | None = None
    evaluate_confirm: Callable[[nn.Module], float] | None = None
    load_model: Callable[[Path], nn.Module] | None = None
    source: str = "Task(…)"
    sha256: str = ""

    def __post_init__(self) -> None:
        for name in ("calibration_data", "evaluation_data", "training_data"):
            object.__setattr__(self, name, self._as_function(name, getattr(self, name)))
        for name in FUNCTIONS:
            value = getattr(self, name)
            if value is not None and not callable(value):
                self._fail(f"{name} is a {type(value).__name__}: expected a function")
        if self.higher_is_better not in (None, True, False):
            self._fail(f"higher_is_better is {self.higher_is_better!r}: expected True or False")
        self._check_metric()
        self._check_parts()
        self._check_direction()

    def _fail(self, message: str) -> None:
        raise TaskError(f"{self.source}: {message}")

    def _as_function(self, name: str, value: Any) -> Any:
        """Return data given as an iterable as a function that returns it."""
        if value is None or (callable(value) and not isinstance(value, Iterable)):
            return value
        if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | Tensor):
            return lambda: value
        kind = type(value).__name__
        return self._fail(f"{name} is a {kind}: expected a function that returns batches")

    def _check_metric(self) -> None:
        if self.metric is None:
            return
        if not isinstance(self.metric, str):
            if not callable(self.metric):
                kind = type(self.metric).__name__
                self._fail(f"metric is a {kind}: expected a name or a function of outputs, targets")
            return
        if self.metric not in METRICS:
            self._fail(unknown("metric", self.metric, METRICS.names()))
        higher = METRICS.get(self.metric).higher_is_better
        if self.higher_is_better not in (None, higher):
            self._fail(
                f"higher_is_better must be {higher} for metric {self.metric!r}: leave it out"
            )

    def _check_parts(self) -> None:
        if self.evaluate is None and self.evaluation_data is None:
            self._fail("has neither evaluation_data nor evaluate: define one of them")
        if self.evaluate is not None and self.evaluation_data is not None:
            self._fail("has both evaluation_data and evaluate: keep one of them")
        if self.evaluate is not None and self.metric is not None:
            self._fail("has both metric and evaluate, which is the metric itself: keep one of them")
        if self.evaluate_confirm is not None and self.evaluate is None:
            self._fail("has evaluate_confirm but no evaluate: define both or neither")
        if self.training_loss is not None and self.training_data is None:
            self._fail("has training_loss but no training_data with targets: define both")
        if self.higher_is_better is not None and self.metric is None and self.evaluate is None:
            self._fail("has higher_is_better but no metric: define metric too, or leave it out")

    def _check_direction(self) -> None:
        """Ask which way a function goes whose name says that a smaller value is the better one."""
        function = self.evaluate if self.metric is None else self.metric
        if self.higher_is_better is not None or function is None or isinstance(function, str):
            return
        name = name_of(function)
        if sounds_smaller(name):
            self._fail(
                f"is a smaller {name} better, as its name says? add the line "
                "`higher_is_better = False`, or `higher_is_better = True` if a larger one is"
            )


FIELDS = tuple(
    field.name for field in dataclasses.fields(Task) if field.name not in ("source", "sha256")
)
"""The names that a task file may define."""


def load_task(path: Path) -> Task:
    """Run the user's task file and return what it defines.

    Its folder is first on sys.path while it loads and stays at the end, for imports inside its
    functions; processes that it starts can import it, too. Raises TaskError in one line, with file
    and line, for what goes wrong in it.
    """
    if not path.is_file():
        raise TaskError(f"{path}: no such task file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TaskError(f"{path}: can not be read: {error.strerror}") from error
    if path.suffix != ".py":
        raise TaskError(f"{path}: a task file is a Python file and ends in .py")
    sha256 = hashlib.sha256(content).hexdigest()
    module = _execute(path, content, sha256)
    _check_names(path, module)
    given = {name: getattr(module, name) for name in FIELDS if hasattr(module, name)}
    return Task(**given, source=str(path), sha256=sha256)


def _execute(path: Path, content: bytes, sha256: str) -> ModuleType:
    """Return the module made of a file's text."""
    module = new_module(path, sha256)

    def failed(reason: str) -> TaskError:
        return TaskError(f"{path}: failed to load: {reason}")

    try:
        with guarded(failed, module.__file__, (SyntaxError,)):
            run(module, content)
    except SyntaxError as error:
        where = f"{error.filename}:{error.lineno}"
        raise TaskError(f"{path}: syntax error: {error.msg} ({where})") from error
    return module


def _check_names(path: Path, module: ModuleType) -> None:
    """Raise TaskError for a name of the module's own that is nearly, but not, a task's."""
    missing = [name for name in FIELDS if not hasattr(module, name)]
    for name, value in vars(module).items():
        if name.startswith("_") or name in FIELDS or isinstance(value, ModuleType):
            continue
        if getattr(value, "__module__", module.__name__) != module.__name__:
            continue
        near = difflib.get_close_matches(name, missing, n=1, cutoff=NEAR)
        if near:
            raise TaskError(
                f"{path}: defines {name!r}: did you mean {near[0]!r}? "
                f"(if not, call it {'_' + name!r})"
            )


def data_task(path: Path, metric: str | None) -> Task:
    """Return the task of a data file with ``inputs`` and, for a metric, ``targets``.

    The file is .npz, .safetensors or a tensor-only .pt; several inputs are ``inputs.NAME`` and
    reach the model by name. Batches have 64 samples. Raises TaskError in one line.
    """
    inputs, targets, sha256 = read_data_file(path)
    if metric in METRICS and not METRICS.get(str(metric)).reference and targets is None:
        raise TaskError(f"{path}: metric {metric!r} needs 'targets', which the file lacks")
    data = inputs if targets is None else (inputs, targets)
    n = batch_size(inputs)

    def evaluation_data() -> Iterable[Any]:
        for start in range(0, n, DATA_BATCH):
            yield take(data, range(start, min(start + DATA_BATCH, n)))

    return Task(evaluation_data=evaluation_data, metric=metric, source=str(path), sha256=sha256)


def run_forward(task: Task, module: nn.Module, inputs: Any) -> Any:
    """Return what the task's ``forward`` makes of one batch.

    Without one, a tuple of inputs is passed as arguments, a dict by name, anything else as is.
    """
    if task.forward is not None:
        return task.forward(module, inputs)
    if isinstance(inputs, tuple):
        return module(*inputs)
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(inputs)


def outputs_of(raw: Any) -> Any:
    """Return the part of a model's output that metrics take.

    ``logits`` where the output has it (Hugging Face), the first entry of a tuple, the fields of
    any other dataclass or mapping as a dict, also within each other, without those that hold
    neither tensors nor numbers (a cache of keys and values is state, not output); a list is one
    item a sample and is kept, as is the rest.
    """
    if isinstance(raw, Mapping):
        return raw["logits"] if "logits" in raw else _plain(raw)
    logits = getattr(raw, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(raw, tuple) and raw:
        return outputs_of(raw[0])
    if dataclasses.is_dataclass(raw) and not isinstance(raw, type):
        return _plain(raw)
    return raw


PARTS = (Tensor, np.ndarray, np.generic, list, *CONSTANTS)
"""What a part of an output is, beside tuples, mappings and dataclasses of such."""


def _plain(value: Any) -> Any:
    """Return mappings and dataclasses as dicts, and tuples, of nothing but PARTS."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        value = {name: part for name, part in fields if part is not None}
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items() if _is_part(part)}
    if isinstance(value, tuple):
        parts = [_plain(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _is_part(value: Any) -> bool:
    return isinstance(value, (*PARTS, tuple, Mapping)) or dataclasses.is_dataclass(value)
