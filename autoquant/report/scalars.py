"""How training goes, as TensorBoard reads it: scalars and texts in event files.

Written by the ``tensorboard`` package's own records, at once and in this thread. PyTorch's
SummaryWriter would write from a thread of its own, which prints a traceback where the disk is full.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from autoquant.errors import UserError
from autoquant.libraries import library

if TYPE_CHECKING:
    from autoquant.training.train import Moment, Step

FLUSHED = 5.0
"""Seconds after which what was written is there for readers; at each check it is anyway."""


def check_scalars() -> None:
    """Raise UserError where the package that scalars need is missing, or can't be loaded."""
    try:
        library("tensorboard.summary.writer.record_writer")
        library("tensorboard.compat.proto.summary_pb2")
    except (ImportError, TypeError) as error:  # the latter where its protobuf is of another time
        raise UserError(
            f"--log needs the package tensorboard: pip install tensorboard ({error})"
        ) from None


class ScalarLog:
    """Writes the scalars of one training to a folder, from its first step on.

    Training that is gone on with takes the place of what the folder has from that step on, and one
    that begins anew of all. Where nothing can be written, ``warn`` is told once, and no more is
    tried: training is worth more than its log.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._folder = folder
        self._warn = warn
        self._file: IO[bytes] | None = None
        self._records: Any = None
        self._flushed = 0.0
        self._broken = False

    def step(self, step: Step) -> None:
        """Write the loss of a step, and what was found in it; nothing of a race of rates."""
        if step.number:
            self._write(step.number, {"loss/step": step.loss})

    def check(self, moment: Moment) -> None:
        """Write a check: losses, metric, rates, shares of weights, findings."""
        text = "\n".join(f"- {finding}" for finding in moment.findings)
        self._write(moment.step, dict(scalars_of(moment)), text)
        self._do(self._flush)

    def _write(self, number: int, scalars: dict[str, float], text: str = "") -> None:
        self._do(lambda: self._add(number, scalars, text))

    def _do(self, what: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            what()
        except OSError as error:
            self._broken = True
            self._warn(
                f"warning: --log {self._folder}: {error.strerror or error}; no more is logged"
            )

    def _add(self, number: int, scalars: dict[str, float], text: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._file is None:
            self._open(number)
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        if text:
            values.append(_text(text))
        self._record(step=number, summary=Summary(value=values))
        if time.monotonic() - self._flushed > FLUSHED:
            self._flush()

    def _open(self, number: int) -> None:
        """Begin a file, and take back what earlier ones have from step ``number`` on."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        seconds, rest = divmod(time.time_ns(), 10**9)  # readers take files by their names' order
        name = f"events.out.tfevents.{seconds:010d}.{rest:09d}"
        self._file = (self._folder / name).open("xb")
        self._records = RecordWriter(self._file)
        self._record(file_version="brain.Event:2")
        self._record(step=number, session_log=SessionLog(status=SessionLog.START))

    def _record(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def _flush(self) -> None:
        if self._file is not None:
            self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Write what is left."""
        file, self._file = self._file, None
        if file is not None:
            self._do(file.close)
            with contextlib.suppress(OSError):  # the same as was warned of
                file.close()


def scalars_of(moment: Moment) -> Iterator[tuple[str, float]]:
    """Yield (tag, value) of a check. Of a kind that is the highest rate that a layer has."""
    yield "loss/mean", moment.loss
    yield "loss/held", moment.held
    yield "loss/best", moment.best
    if moment.value is not None:
        yield f"metric/{moment.metric}", moment.value
    yield "weights/frozen", moment.frozen
    yield "weights/lost", moment.lost
    highest: dict[str, float] = {}
    for row in moment.rates:
        highest[row.kind] = max(highest.get(row.kind, 0.0), row.rate)
        yield f"rate_{row.kind}/{row.site}", row.rate
    yield from ((f"rate/{kind}", rate) for kind, rate in highest.items())


def _text(text: str) -> Any:
    """Return a text as TensorBoard's tab of that name shows it."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.text.metadata import create_summary_metadata

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=[text.encode()])
    metadata = create_summary_metadata("findings", "what went wrong, and what was done about it")
    return Summary.Value(tag="findings", metadata=metadata, tensor=tensor)
