"""The task's data as three disjoint parts: to calibrate, to search by, and to confirm with.

Evaluation data is split at the level of samples by a permutation that depends on the seed and the
number of samples alone. Within a part the user's order is kept, and pieces of batches are joined
again up to the user's batch size where their shapes fit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from autoquant.errors import TaskError
from autoquant.models.batches import Pair, as_inputs, as_pair, checked_size, is_pair, read
from autoquant.models.digests import glimpse, sample_digests
from autoquant.models.metrics import METRICS
from autoquant.models.trees import Tree, batch_size, concat, take, to_device

if TYPE_CHECKING:
    from autoquant.models.task import Task

__all__ = [
    "Splits",
    "batch_size",
    "calibration_inputs",
    "concat",
    "evaluation_pairs",
    "make_splits",
    "take",
    "to_device",
    "training_pairs",
    "without_samples",
]

TRAINING_SAMPLES = 1 << 16
"""Samples that are trained with, at most."""


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint data, on the CPU: inputs to calibrate with, (inputs, targets) to measure with.

    - ``samples`` counts each part's samples, by its name; ``notes`` are lines for the user.
    - ``readings`` are quick digests of the batches as they were read, by the task's function, and
      ``like`` is a batch of evaluation inputs: with these the data can be read again and compared.
    """

    calibrate: tuple[Tree, ...]
    search: tuple[Pair, ...]
    confirm: tuple[Pair, ...]
    samples: dict[str, int]
    notes: tuple[str, ...]
    readings: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)
    like: Tree | None = None


def make_splits(task: Task, seed: int = 0, calibration_samples: int = 512) -> Splits:
    """Return the task's data, read once, in three disjoint parts.

    At most ``calibration_samples`` samples are taken to calibrate: the first ones of
    ``calibration_data``, or without it a quarter of the evaluation data. The rest is halved into
    search and confirm. Samples of the evaluation data whose inputs are bit for bit among those
    calibrated with are dropped. A task with only ``evaluate`` has no search and confirm parts.
    Raises TaskError for data that is empty, mismatched, or too little to split.
    """
    pairs = [] if task.evaluation_data is None else _evaluation(task)
    like = pairs[0][0] if pairs else None
    calibrate: tuple[Tree, ...] = ()
    readings = {"evaluation_data": tuple(glimpse(pair) for pair in pairs)}
    if task.calibration_data is not None:
        calibrate = tuple(calibration_inputs(task, calibration_samples, like))
        readings["calibration_data"] = tuple(glimpse(inputs) for inputs in calibrate)
    notes: list[str] = []
    if task.evaluation_data is None:
        if task.evaluate_confirm is None:
            notes.append("without evaluate_confirm the drop is measured on data the search saw")
        return Splits(calibrate, (), (), _count(calibrate, (), ()), tuple(notes), readings)
    keep = _unseen(pairs, calibrate)
    dropped = sum(len(mask) - int(mask.sum()) for mask in keep)
    if dropped:
        notes.append(f"{dropped} evaluation samples are in the calibration data: not used twice")
    n = sum(int(mask.sum()) for mask in keep)
    own = calibrate == ()
    fewest = 3 if own else 2
    if n < fewest:
        left = f" besides {dropped} that are in the calibration data too" if dropped else ""
        raise TaskError(
            f"{task.source}: {n} evaluation sample{'s' * (n != 1)}{left} can not be split into "
            f"{'calibration, search and confirm' if own else 'search and confirm'}: "
            f"give at least {fewest}"
        )
    parts = _assign(n, seed, min(max(n // 4, 1), calibration_samples) if own else 0)
    whole = max(len(mask) for mask in keep)
    chosen = [_pieces(pairs, keep, parts, part, whole) for part in range(3)]
    if own:
        calibrate = tuple(inputs for inputs, _ in chosen[0])
    search, confirm = tuple(chosen[1]), tuple(chosen[2])
    count = _count(calibrate, search, confirm)
    return Splits(calibrate, search, confirm, count, tuple(notes), readings, like)


def without_samples(splits: Splits, known: Collection[bytes], length: int) -> Splits:
    """Return the data without what is confirmed with and has inputs of ``known`` digests.

    These are the first ``length`` bytes of what ``sample_digests`` gives.
    """
    kept: list[Pair] = []
    for pair in splits.confirm:
        own = [i for i, d in enumerate(sample_digests([pair[0]])) if d[:length] not in known]
        if own:
            kept.append(take(pair, own))
    samples = splits.samples | {"confirm": sum(batch_size(inputs) for inputs, _ in kept)}
    gone = splits.samples["confirm"] - samples["confirm"]
    if not gone:
        return splits
    note = f"{gone} samples to confirm with were searched by before: not used"
    return replace(splits, confirm=tuple(kept), samples=samples, notes=(*splits.notes, note))


def _count(
    calibrate: Sequence[Tree], search: Sequence[Pair], confirm: Sequence[Pair]
) -> dict[str, int]:
    return {
        "calibrate": sum(batch_size(inputs) for inputs in calibrate),
        "search": sum(batch_size(inputs) for inputs, _ in search),
        "confirm": sum(batch_size(inputs) for inputs, _ in confirm),
    }


def _assign(n: int, seed: int, calibrate: int) -> np.ndarray:
    """Return each sample's part [n]: 0 calibrate, 1 search, 2 confirm; the last two balanced."""
    order = np.random.default_rng([seed, n]).permutation(n)
    parts = np.full(n, 2)
    parts[order[:calibrate]] = 0
    parts[order[calibrate : calibrate + (n - calibrate + 1) // 2]] = 1
    return parts


def _pieces(
    pairs: Sequence[Pair], keep: Sequence[np.ndarray], parts: np.ndarray, part: int, whole: int
) -> list[Pair]:
    """Return the samples of one part, in order, in batches of at most ``whole`` samples."""
    pieces: list[Pair] = []
    start = 0
    for pair, mask in zip(pairs, keep, strict=True):
        own = np.flatnonzero(mask)
        mine = own[parts[start : start + len(own)] == part]
        start += len(own)
        if not len(mine):
            continue
        piece = take(pair, mine)
        joined = concat([pieces[-1], piece]) if pieces and batch_size(pieces[-1]) < whole else None
        if joined is None:
            pieces.append(piece)
        else:
            size = batch_size(joined)
            cuts = [range(at, min(at + whole, size)) for at in range(0, size, whole)]
            pieces[-1:] = [take(joined, cut) for cut in cuts]
    return pieces


def _unseen(pairs: Sequence[Pair], calibrate: Sequence[Tree]) -> list[np.ndarray]:
    """Return, a batch, which samples [n] are not among those calibrated with."""
    seen = set(sample_digests(calibrate))
    if not seen:
        return [np.ones(batch_size(inputs), dtype=bool) for inputs, _ in pairs]
    return [np.array([d not in seen for d in sample_digests([inputs])]) for inputs, _ in pairs]


def evaluation_pairs(task: Task) -> Iterator[Pair]:
    """Yield the batches of the evaluation data, each checked by itself."""
    assert task.evaluation_data is not None
    for number, batch in read(task.source, "evaluation_data", task.evaluation_data):
        where = f"{task.source}: evaluation_data, batch {number}"
        inputs, targets = as_pair(batch, where)
        if targets is None and _needs_targets(task):
            raise TaskError(
                f"{where} has no targets, which metric {task.metric!r} needs: "
                "yield (inputs, targets)"
            )
        yield inputs, targets


def _evaluation(task: Task) -> list[Pair]:
    """Return all batches of the evaluation data, checked."""
    pairs = list(evaluation_pairs(task))
    with_targets = [targets is not None for _, targets in pairs]
    if any(with_targets) and not all(with_targets):
        number = with_targets.index(not with_targets[0]) + 1
        raise TaskError(
            f"{task.source}: evaluation_data, batch {number}: some batches have targets, some not"
        )
    return pairs


def _needs_targets(task: Task) -> bool:
    return isinstance(task.metric, str) and not METRICS.get(task.metric).reference


def calibration_inputs(task: Task, most: int, like: Tree | None) -> Iterator[Tree]:
    """Yield batches of inputs up to ``most`` samples; ``like`` is a batch of evaluation inputs."""
    return _inputs(task, "calibration_data", most, like)


def training_pairs(task: Task, splits: Splits, most: int = TRAINING_SAMPLES) -> tuple[Pair, ...]:
    """Return batches of (inputs, targets) to train with, ``most`` samples of them at most.

    Those of ``training_data``, without what the search measures by, or confirms with; without it
    those to calibrate with. Targets are None where the task has no ``training_loss`` that takes
    them. Raises TaskError for data that are empty or of another form, or have no targets.
    """
    if task.training_data is None:
        return tuple((batch, None) for batch in splits.calibrate if batch is not None)
    held = [inputs for inputs, _ in (*splits.search, *splits.confirm)]
    seen, found = set(sample_digests(held)), list[Pair]()
    given = _labelled(task, most)
    if task.training_loss is None:
        given = ((x, None) for x in _inputs(task, "training_data", most, splits.like))
    for pair in given:
        rows = [i for i, digest in enumerate(sample_digests([pair[0]])) if digest not in seen]
        if rows:
            found.append(pair if len(rows) == batch_size(pair[0]) else take(pair, rows))
    if not found:
        raise TaskError(f"{task.source}: training_data has nothing that is not evaluated with")
    return tuple(found)


def _labelled(task: Task, most: int) -> Iterator[Pair]:
    """Yield batches of (inputs, targets) of ``training_data``, up to ``most`` samples."""
    assert task.training_data is not None
    left = most
    for number, batch in read(task.source, "training_data", task.training_data):
        where = f"{task.source}: training_data, batch {number}"
        inputs, targets = as_pair(batch, where)
        if targets is None:
            raise TaskError(
                f"{where} has no targets, which training_loss takes: yield (inputs, targets)"
            )
        size = batch_size(inputs)
        yield (inputs, targets) if size <= left else take((inputs, targets), range(left))
        left -= min(size, left)
        if not left:
            return


def _inputs(task: Task, name: str, most: int, like: Tree | None) -> Iterator[Tree]:
    """Yield batches of inputs of the task's function ``name``, up to ``most`` samples."""
    left = most
    for number, batch in read(task.source, name, getattr(task, name)):
        where = f"{task.source}: {name}, batch {number}"
        inputs = as_inputs(batch, where)
        if is_pair(batch) and like is not None and _form(inputs) != _form(like):
            # The loader that also serves evaluation: its targets are of no use here.
            first = as_inputs(batch[0], where)
            inputs = first if _form(first) == _form(like) else inputs
        size = checked_size(inputs, where)
        yield inputs if size <= left else take(inputs, range(left))
        left -= min(size, left)
        if not left:
            return


def _form(tree: Tree) -> Any:
    """Return what two batches of one kind share: containers, ranks and dtypes."""
    if isinstance(tree, Tensor):
        return (tree.ndim, tree.dtype)
    if isinstance(tree, dict):
        return {key: _form(part) for key, part in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_form(part) for part in tree)
    return type(tree)
