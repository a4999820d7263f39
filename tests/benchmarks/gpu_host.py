"""What the host spends on a candidate beside the device: it bounds candidates a second on a GPU.

A recorder whose replay does nothing stands in for the GPU, so that what is left is the host's:
switching to a recipe, finding its program, handing inputs and outputs over, and the metric.
Readings are those of whatever was recorded first, and mean nothing. Launching graphs and waiting
for them is not in it, nor are products of modules that can't be recorded; copying a recipe's
weights is, which on a GPU is a kernel's work.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from autoquant.kernels.engine import Engine
from autoquant.kernels.recording import Work
from autoquant.session import session as sessions
from autoquant.session.session import Session
from tests.benchmarks.gpu_evaluation import Bench, Place, candidates_a_second, drawn, opened
from tests.benchmarks.gpu_models import Sized
from tests.benchmarks.overhead import knapsack, through_autoquant
from tests.measure.recorder import EagerEngine, EagerProduct, StandIn

CPU = torch.device("cpu")
ROUNDS = 24
TRIALS = 60


@dataclass(frozen=True)
class Still:
    """A call that was made once; its replay does nothing."""

    outputs: list[Tensor]

    def replay(self) -> None:
        """Do nothing."""


class StillRecorder(StandIn):
    """Refuses what a CUDA graph can't hold; of all else it keeps what a call returned, no more."""

    def record(self, work: Work) -> Still:  # type: ignore[override]
        """Call it."""
        return Still(super().record(work).outputs)


def still_engine(*_: object) -> Engine:
    """Return an engine of PyTorch's operators, with that recorder."""
    engine = EagerEngine()
    engine.recorder = StillRecorder()
    return engine


@dataclass(frozen=True)
class HostCost:
    """Milliseconds of the host for one candidate, by what they go to.

    ``switching`` is the applier's work on a recipe, ``programs`` all batches up to their outputs
    on the host, ``reading`` the metric and the divergence, ``sampler`` suggesting and recording a
    trial. ``replays`` are those of one candidate, ``said`` which modules aren't recorded. ``cpu``
    is how many candidates this CPU measures in a second of its time, computing them.
    """

    name: str
    layers: int
    batches: int
    recordings: int
    replays: int
    switching: float
    programs: float
    reading: float
    sampler: float
    cpu: float
    said: tuple[str, ...]

    @property
    def whole(self) -> float:
        """All of it."""
        return self.switching + self.programs + self.reading + self.sampler


def of_session(session: Session, rounds: int = ROUNDS) -> tuple[float, float, float]:
    """Return switching, programs and reading of one candidate: medians over random recipes.

    Milliseconds of this process's processor time: other processes are not in it.
    """
    rng = random.Random(0)
    recipes = [drawn(session, rng) for _ in range(rounds)]
    session.baseline("search")
    programs = session.evaluator.programs
    assert programs is not None
    batch, inside, computing = programs.batch, [0.0], [0.0]
    multiply = EagerProduct.__call__

    @contextlib.contextmanager
    def timed() -> Iterator[None]:
        start = time.process_time()
        with batch():
            yield
        inside[0] += time.process_time() - start

    def taken_out(*arguments: Any) -> Tensor:
        start = time.process_time()
        y = multiply(*arguments)
        computing[0] += time.process_time() - start
        return y

    for recipe in recipes:  # quantizes weights and records
        session.applier.apply(recipe)
        session.evaluator.read(session.model, "search")
    rows = []
    with (
        mock.patch.object(programs, "batch", timed),
        mock.patch.object(EagerProduct, "__call__", taken_out),
    ):
        for recipe in recipes:
            inside[0] = computing[0] = 0.0
            start = time.process_time()
            session.applier.apply(recipe)
            middle = time.process_time()
            session.evaluator.read(session.model, "search")
            reading = time.process_time() - middle - inside[0]
            rows.append((middle - start, inside[0] - computing[0], reading))
    switching, by_programs, reading = (1e3 * statistics.median(c) for c in zip(*rows, strict=True))
    return switching, by_programs, reading


def forward_ms(case: Sized, rounds: int = ROUNDS) -> float:
    """Return the milliseconds that the host takes around the replay of one forward.

    The model is as deep as it is, and thin, so that copying its inputs costs nothing.
    """
    place = Place(CPU, still_engine, StillRecorder(), real=False)
    bench = Bench(replace(case, small=case.thin), place)
    times = []
    for _ in range(rounds):
        start = time.process_time()
        bench.replayed()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def measure(name: str) -> HostCost:
    """Measure one model of the zoo; raise FileNotFoundError where it is not there."""
    with tempfile.TemporaryDirectory() as folder:
        cpu = candidates_a_second(opened(name, CPU, Path(folder)), now=time.process_time)
        with mock.patch.object(sessions, "make_engine", still_engine):
            session = opened(name, CPU, Path(folder))
    said: list[str] = []
    session.record(said.append)
    switching, by_programs, reading = of_session(session)
    programs = session.evaluator.programs
    assert programs is not None
    before = programs.replays
    session.evaluator.read(session.model, "search")
    layers = len(session.prepared.sites)
    trials = through_autoquant(f"host-{name}", knapsack, layers, TRIALS, time.process_time)
    return HostCost(
        name,
        layers,
        len(session.splits.search),
        programs.recordings,
        programs.replays - before,
        switching,
        by_programs,
        reading,
        1e3 * statistics.median(trials),
        cpu,
        tuple(said),
    )
