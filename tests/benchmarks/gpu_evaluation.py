"""What evaluating one candidate costs on a GPU; ``tests.benchmarks.evaluation --device cuda``.

Models with random weights, every layer at 8 bits: the whole forward by recorded programs and
without recording, against PyTorch's float32 and bfloat16, which also run in a CUDA graph and
compiled. All take turns in one process. Then models of the zoo whose data are there: candidates a
second on their search split. Nothing needs a network.

On the CPU a recorder stands in for CUDA graphs, and small models run: that says whether this file
works, and is no measurement.
"""

from __future__ import annotations

import copy
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autoquant.errors import UserError
from autoquant.kernels.engine import Engine, make_engine
from autoquant.kernels.gpu.launch import observing
from autoquant.kernels.recording import Recorder
from autoquant.kernels.reference import full_float32
from autoquant.measure.programs import Programs
from autoquant.methods.applier import Applier
from autoquant.models.files import load
from autoquant.models.task import load_task
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare, use_channels_last
from autoquant.session.session import Session, open_session
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from tests.benchmarks.evaluation import Run, in_turn, line
from tests.benchmarks.gpu_models import MODELS, Sized, has_transformers
from tests.benchmarks.machine import describe_machine, gpu_kind
from tests.zoo.conftest import HERE, task_module

REPORTS = Path(__file__).resolve().parents[2] / "reports"
ZOO = ("resnext", "g2p")
ABSENT = (FileNotFoundError, ImportError, UserError)
"""What is raised where the data of a model are not there."""
SAMPLES = 32
"""Most samples of a batch that ranges are calibrated on."""
NO_MEASUREMENT = "No measurement: small models on a CPU, by a recorder that stands in for graphs."
WARM_UP, RECIPES = 4, 24
"""Candidates before those that are timed, and these."""


@dataclass(frozen=True)
class Place:
    """Where models run: an engine for each, and a recorder. ``real`` says that times mean much."""

    device: torch.device
    engine: Callable[[], Engine]
    recorder: Recorder
    real: bool

    def wait(self) -> None:
        """Wait until all that was launched is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def gpu() -> Place:
    """Return the current GPU; raise where nothing can be recorded there."""
    device = torch.device("cuda", torch.cuda.current_device())
    engine = make_engine(device)
    if engine.recorder is None:
        raise SystemExit("; ".join(engine.notes) or f"nothing is recorded on {device}")
    return Place(device, lambda: make_engine(device), engine.recorder, True)


def stand_in() -> Place:
    """Return the CPU with a recorder that stands in for CUDA graphs."""
    from tests.measure.recorder import EagerEngine, StandIn

    return Place(torch.device("cpu"), EagerEngine, StandIn(), False)


class Bench:
    """One model: as PyTorch runs it, and as a candidate.

    ``first`` are the seconds until the first candidate has run, from the float model being on the
    device; ``recording`` those of the second run, which records. ``said`` is why parts aren't.
    """

    def __init__(self, case: Sized, place: Place) -> None:
        self.case, self.place = case, place
        module, x = case.made(small=not place.real)
        self.float_model = module.to(place.device)
        self.x = x.to(place.device)
        model = copy.deepcopy(self.float_model)
        self.said: list[str] = []
        place.wait()
        start = time.perf_counter()
        self._prepare(model)
        self.apply(self.recipe)
        self.replayed()
        self.first = time.perf_counter() - start
        start = time.perf_counter()
        self.replayed()
        self.recording = time.perf_counter() - start

    def _prepare(self, model: nn.Module) -> None:
        def run(m: nn.Module, x: Tensor) -> Tensor:
            with full_float32(self.place.device):
                return m(x)

        few = self.x[:SAMPLES]
        prepared = prepare(model, lambda m: run(m, few), engine=self.place.engine())
        if any(site.layer == "Conv2d" for site in prepared.sites):
            use_channels_last(model)
        self.applier = Applier(prepared, calibrate(prepared, [few], run))
        self.model = prepared.model
        self.programs = Programs(prepared, self.place.recorder, self.said.append)
        self.recipe = self.uniform(8)

    def uniform(self, bits: int) -> dict[str, SiteRecipe]:
        """Return a recipe with weights of so many bits and activations of 8 in every layer."""
        sites = self.applier.prepared.sites
        activation = ActivationScheme(8)
        return {
            s.name: SiteRecipe(WeightScheme(bits), activation if s.activation else None)
            for s in sites
        }

    def apply(self, recipe: dict[str, SiteRecipe]) -> None:
        """Switch to a recipe."""
        with torch.no_grad():
            self.applier.apply(recipe)

    def replayed(self) -> Tensor:
        """Run one candidate's forward as a search does, by programs; wait for its numbers."""
        with torch.no_grad(), full_float32(self.place.device):
            with self.programs.batch():
                y = self.model(self.x)
            self.programs.doubted()
        return y

    def eager(self) -> Tensor:
        """Run it without recording, as ``--backend eager`` does."""
        with torch.no_grad(), full_float32(self.place.device):
            y: Tensor = self.model(self.x)
        return y

    def launches(self) -> Counter[str]:
        """Return the launches of this project's kernels in one forward as it is recorded."""
        found: Counter[str] = Counter()
        flag = torch.zeros(1, dtype=torch.int32, device=self.place.device)
        engine = self.applier.prepared.engine
        with engine.collecting(flag), observing(lambda name, _: found.update([name])):
            self.eager()
        return found

    def runs(self, *, compiled: bool) -> dict[str, Run]:
        """Return what takes turns; each waits for the device."""
        half = copy.deepcopy(self.float_model).to(torch.bfloat16)
        half = half.to(memory_format=torch.channels_last)
        x = self.x.to(torch.bfloat16) if self.x.is_floating_point() else self.x
        runs: dict[str, Run] = {
            "float32": lambda: self.float_model(self.x),
            "bfloat16": lambda: half(x),
            "bfloat16, one graph": self._recorded(lambda: half(x)),
        }
        if compiled:
            fast = torch.compile(half)
            runs["bfloat16, compiled, one graph"] = self._recorded(lambda: fast(x))
        runs["replayed"] = self.replayed
        runs["not recorded"] = self.eager

        def waiting(run: Run) -> Run:
            def whole() -> None:
                run()
                self.place.wait()

            return whole

        return {name: waiting(run) for name, run in runs.items()}

    def _recorded(self, run: Callable[[], Tensor]) -> Run:
        with torch.no_grad():
            for _ in range(2):
                run()
            return self.place.recorder.record(lambda: [run()]).replay

    def switching(self, repeats: int) -> float:
        """Return what going to another recipe whose weights are cached adds to a forward, in ms."""
        turns = [self.uniform(6), self.recipe]
        for recipe in turns:
            self.apply(recipe)
            self.replayed()
        with_switch, without = [], []
        for i in range(2 * repeats):
            start = time.perf_counter()
            self.apply(turns[i % 2])
            self.replayed()
            middle = time.perf_counter()
            self.replayed()
            with_switch.append(middle - start)
            without.append(time.perf_counter() - middle)
        return 1e3 * (statistics.median(with_switch) - statistics.median(without))

    def error(self) -> float:
        """Return how far the candidate is from float32, relative to it."""
        with torch.no_grad():
            y, t = self.replayed().float(), self.float_model(self.x).float()
        return float((y - t).norm() / t.norm())


HEAD = [
    "one batch, W8A8",
    "target on an H200, ms",
    "float32",
    "bfloat16",
    "bfloat16, one graph",
    "bfloat16, compiled, one graph",
    "replayed",
    "not recorded",
    "replayed against the fastest bfloat16",
    "first candidate, s",
    "recording it, s",
    "switching, ms",
    "recordings",
    "launches of own kernels",
    "error to float32",
]


def row(case: Sized, place: Place, repeats: int, *, compiled: bool) -> tuple[list[str], list[str]]:
    """Return one model's row, and notes on it."""
    bench = Bench(case, place)
    found = in_turn(bench.runs(compiled=compiled), repeats)
    half = min(t for name, t in found.items() if name.startswith("bfloat16"))
    switch, launches = bench.switching(repeats), bench.launches()
    title = case.title if place.real else f"{case.name}, small, no measurement"
    cells = [
        title,
        f"{case.target}",
        *(f"{found[name]:.2f}" if name in found else "" for name in HEAD[2:8]),
        f"{half / found['replayed']:.2f}×",
        f"{bench.first:.2f}",
        f"{bench.recording:.2f}",
        f"{switch:.2f}",
        f"{bench.programs.recordings}",
        f"{launches.total()}",
        f"{bench.error():.4f}",
    ]
    kernels = ", ".join(f"{n} {name}" for name, n in launches.most_common())
    notes = [f"{case.title}: {kernels}"] if kernels else []
    return cells, notes + [f"{case.title}: {said}" for said in bench.said]


HEAD_ZOO = ["search split", "batches", "candidates a second", "not recorded", "recordings"]


def drawn(session: Session, rng: random.Random) -> dict[str, SiteRecipe]:
    """Return a random recipe of 8, 6 and 4 bits, activations of 8."""
    return {
        s.name: SiteRecipe(
            WeightScheme(rng.choice((8, 6, 4))), ActivationScheme(8) if s.activation else None
        )
        for s in session.prepared.sites
    }


def candidates_a_second(
    session: Session, recipes: int = RECIPES, now: Callable[[], float] = time.perf_counter
) -> float:
    """Return how many random recipes are measured a second on the search split, caches warm.

    Seconds are those of the clock ``now``.
    """
    rng = random.Random(0)
    session.baseline("search")
    for _ in range(WARM_UP):
        session.measure(drawn(session, rng), "search")
    start = now()
    for _ in range(recipes):
        session.measure(drawn(session, rng), "search")
    return recipes / (now() - start)


def zoo_row(name: str, session: Session, recipes: int = RECIPES) -> list[str]:
    """Return the row of one model with its data."""
    plain = candidates_a_second(session, recipes)
    # What was measured is remembered: a session of the same recipes is told to measure them anew.
    session.recalibrate(session.statistics)
    recorded = session.record()
    fast = candidates_a_second(session, recipes) if recorded else plain
    programs = session.evaluator.programs
    made = 0 if programs is None else programs.recordings
    batches = len(session.splits.search)
    return [name, f"{batches}", f"{fast:.1f}" if recorded else "", f"{plain:.1f}", f"{made}"]


def opened(name: str, device: torch.device, folder: Path) -> Session:
    """Return a session on a model of the zoo; raise FileNotFoundError where it is not there.

    ResNeXt is not trained: that makes no difference to its speed.
    """
    module = task_module(name)
    if name == "resnext":
        path = folder / "resnext.pt"
        torch.save(module.ResNeXt().state_dict(), path)
    else:
        path = module.weights()
    task = load_task(HERE / f"{name}.py")
    return open_session(load(Path(path), load_model=task.load_model), task, device)


def table(head: list[str], rows: Sequence[list[str]]) -> str:
    """Return rows below a heading."""
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def main(names: tuple[str, ...], repeats: int, *, quick: bool, simulate: bool) -> None:
    """Measure and print what ``names`` say, or all that is there; write the report of a GPU."""
    place = stand_in() if simulate else gpu()
    rows, zoo_rows, notes = [], [], []
    if not place.real:
        print(NO_MEASUREMENT)
    known = [name for name in MODELS if name != ("encoder" if has_transformers() else "bert")]
    failed = []
    for name in names or (*known, *ZOO):
        if name in MODELS:
            try:
                cells, more = row(MODELS[name], place, repeats, compiled=place.real and not quick)
            except Exception as error:  # one model that fails does not end the others
                failed.append(f"{name}: {type(error).__name__}: {error}")
                print(failed[-1], flush=True)
                continue
            rows.append(cells)
            notes += more
            print("; ".join(f"{h} {c}" for h, c in zip(HEAD, cells, strict=True) if c), flush=True)
            for note in more:
                print(f"  {note}", flush=True)
        elif place.real:
            try:
                with tempfile.TemporaryDirectory() as folder:
                    zoo_rows.append(zoo_row(name, opened(name, place.device, Path(folder))))
            except ABSENT as error:
                print(f"{name} is left out: {error}", flush=True)
                continue
            print(line(zoo_rows[-1]), flush=True)
    text = table(HEAD, rows)
    if zoo_rows:
        text += "\n\n" + table(HEAD_ZOO, zoo_rows)
    if notes:
        text += "\n\n" + "\n".join(f"- {note}" for note in notes)
    if place.real and rows and not quick:
        REPORTS.joinpath(f"evaluation-{gpu_kind()}.md").write_text(report(text, repeats))
    print(f"\n{text}")
    if failed:
        raise SystemExit(f"{len(failed)} of the models failed")
    if not place.real:
        print(f"\n{NO_MEASUREMENT}")
    else:
        at = HEAD.index("replayed")
        print("\n" + "; ".join(f"{cells[0]}: {cells[at]} ms (≤ {cells[1]})" for cells in rows))


def report(text: str, repeats: int) -> str:
    """Return the report with its tables."""
    name = torch.cuda.get_device_name()
    return (
        f"# Evaluating one candidate on {name}\n\n`python -m tests.benchmarks.evaluation --device "
        f"cuda`: milliseconds for one batch, medians of {repeats}, taking turns in one process, "
        "each from the call until the device is done. Weights are random. Float32 is as PyTorch "
        "runs it by default, bfloat16 channels last. A candidate runs in full float32 where it is "
        "not int8; *replayed* is by recorded programs, as in a search, with the look at its doubts "
        "(numbers that int8 can't carry), *not recorded* as with `--backend eager`. The first "
        "candidate is counted from the float model being on the device: preparing, calibrating, "
        "quantizing weights, compiling kernels and one forward. Switching is what another recipe "
        f"of the same form, its weights cached, adds to a forward.\n\n{text}\n\n"
        f"{describe_machine()} GPU: {name}, CUDA {torch.version.cuda}.\n"
    )
