"""Reading a task's data a second time, to find out whether they are the same.

Data that are shuffled, augmented or drawn anew can't be kept apart into what a search has seen and
what its result is confirmed on: a study that is resumed, or a recipe that is measured later, would
find other parts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from autoquant.errors import TaskError
from autoquant.models.batches import NoBatches
from autoquant.models.data import Splits, calibration_inputs, evaluation_pairs
from autoquant.models.digests import glimpse
from autoquant.models.task import Task
from autoquant.models.trees import Tree

SECONDS = 2.0
"""How long data are read again; the first batch is, however long it takes."""


def check_rereads(task: Task, splits: Splits) -> None:
    """Read the data again; TaskError, naming the function, where they are not those of ``splits``.

    ``SECONDS`` are spent on each function.
    """
    if task.evaluation_data is not None:
        _check(task, "evaluation_data", splits.readings["evaluation_data"], evaluation_pairs(task))
    if task.calibration_data is not None:
        known = splits.readings["calibration_data"]
        again = calibration_inputs(task, splits.samples["calibrate"], splits.like)
        _check(task, "calibration_data", known, again)


def _check(task: Task, name: str, known: tuple[bytes, ...], again: Iterator[Tree]) -> None:
    began = time.monotonic()
    number = 0
    try:
        for number, batch in enumerate(again, 1):
            if number > len(known) or glimpse(batch) != known[number - 1]:
                raise TaskError(
                    f"{task.source}: {name} gives other data each time it is read (batch {number} "
                    "differs), and what a search has seen must stay apart from what its result is "
                    "confirmed on: don't shuffle, and seed anew what is drawn at random"
                )
            if time.monotonic() - began > SECONDS:
                return
    except NoBatches:
        number = 0
    if number < len(known):
        raise TaskError(
            f"{task.source}: {name} gives {len(known)} batches the first time and {number} the "
            "second: give a function that returns them anew, or a list"
        )
