"""What evaluating one candidate costs: ``python -m tests.benchmarks.evaluation``.

Real models with every layer at 8 bits, weights and activations. Float32 and bfloat16 as PyTorch
runs them, PyTorch's fake-quantize operators, and this engine take turns in one process; medians.
Writes a report for each kind of processor, ``reports/evaluation-….md``. With ``--device cuda``:
see ``tests.benchmarks.gpu_evaluation``.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autoquant.heap import keep_freed_memory
from autoquant.models.files import load
from autoquant.models.task import load_task, run_forward
from autoquant.nn.convert import deploy
from autoquant.session.session import Session, open_session
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from tests.benchmarks.machine import describe_machine, kind
from tests.benchmarks.reuse import one_site_changed
from tests.zoo.conftest import HERE, task_module

REPORTS = Path(__file__).resolve().parents[2] / "reports"
Run = Callable[[], Any]

W8A8 = WeightScheme(8), ActivationScheme(8)


@dataclass(frozen=True)
class Case:
    """One model of the zoo and what is run of it: a title, and inputs from its task's own.

    Weights of ``linear`` ones, whose layers all are, can have scales by groups of columns.
    """

    title: str
    name: str
    inputs: Callable[[Session], Any]
    part: Callable[[nn.Module], Callable[..., Any]] | None = None
    linear: bool = False


def photos(session: Session) -> Tensor:
    """Return 50 photos."""
    return torch.cat([x for x, _ in session.splits.search[:2]])[:50]


def tokens(_: Session) -> tuple[Tensor, Tensor]:
    """Return 64 texts of 64 tokens, none of them padding."""
    ids = torch.randint(1000, 20_000, (64, 64), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids)


def first(session: Session) -> Any:
    """Return the first batch of the task."""
    return session.splits.search[0][0]


CASES = (
    Case("MiniLM, 64 × 64 tokens", "minilm", tokens, lambda m: m.bert, True),  # type: ignore[return-value]
    Case("MobileNetV2, 50 photos of 224²", "mobilenet_v2", photos),
    Case("g2p (GRU), 250 words", "g2p", first),
    Case("ResNeXt (8 groups), one batch", "resnext", first),
)


def opened(name: str, folder: Path) -> tuple[nn.Module, Session]:
    """Return the float model as a user has it, and a session on another copy."""
    module = task_module(name)
    if name == "resnext":
        path = folder / "resnext.pt"
        module.train(path)
    else:
        path = module.weights()
    task = load_task(HERE / f"{name}.py")
    loaded = load(Path(path), load_model=task.load_model)
    return copy.deepcopy(loaded.module), open_session(loaded, task, torch.device("cpu"))


def eight_bits(session: Session, **weight: Any) -> dict[str, SiteRecipe]:
    """Return W8A8, or another uniform recipe, for every layer."""
    made = WeightScheme(**({"bits": 8} | weight))
    return {
        s.name: SiteRecipe(made, W8A8[1] if s.activation else None) for s in session.prepared.sites
    }


def fake_quantized(session: Session) -> nn.Module:
    """Return the folded float model with PyTorch's fake-quantize operator before every layer.

    Weights are quantized once, beforehand, and hidden states of recurrent layers are left alone:
    both are less work than PyTorch's own quantization-aware modules do.
    """
    done = session.applier.apply(eight_bits(session))
    real = {
        name: held.dequantize()
        for name, site in session.applier._sites.items()
        if (held := session.applier.weight(site, done[name])) is not None
    }
    session.applier.to_float()
    model = deploy(session.prepared, {})
    for site in session.prepared.sites:
        path, name = site.users[0]
        module = model.get_submodule(path)
        getattr(module, name).data.copy_(real[site.name])
        made = done[site.name].activation
        if made is None or (isinstance(module, nn.RNNBase) and "hh" in name):
            continue
        module.register_forward_pre_hook(_fake_quantize(made.scale, made.zero_point or 0))
    return model


def _fake_quantize(scale: float | None, zero_point: int) -> Callable[..., Any]:
    def quantize(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -128, 127)

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        packed = args[0]
        if isinstance(packed, torch.nn.utils.rnn.PackedSequence):
            return packed._replace(data=quantize(packed.data)), *args[1:]
        return quantize(packed), *args[1:]

    return hook


def in_turn(runs: Mapping[str, Run], repeats: int) -> dict[str, float]:
    """Return the median milliseconds of each run; they take turns, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for run in runs.values():
            run()
        for _ in range(repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


class Bench:
    """One case: the models to compare, and their inputs."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.float_model, self.session = opened(case.name, folder)
        self.inputs = case.inputs(self.session)
        self.recipe = eight_bits(self.session)
        self.fake = fake_quantized(self.session)
        self.bfloat16 = copy.deepcopy(self.float_model).to(torch.bfloat16)
        self.session.applier.apply(self.recipe)

    def run(self, model: nn.Module, inputs: Any = None) -> Any:
        """Return the outputs of ``model`` on the inputs."""
        inputs = self.inputs if inputs is None else inputs
        if self.case.part is not None:
            return self.case.part(model)(*inputs)
        return run_forward(self.session.task, model, inputs)

    def half(self) -> Any:
        """Run in bfloat16."""

        def cast(x: Any) -> Any:
            narrow = isinstance(x, Tensor) and x.is_floating_point()
            return x.to(torch.bfloat16) if narrow else x

        return self.run(self.bfloat16, pytree.tree_map(cast, self.inputs))

    def runs(self) -> dict[str, Run]:
        """Return what takes turns."""
        return {
            "float32": lambda: self.run(self.float_model),
            "bfloat16": self.half,
            "fake quantization": lambda: self.run(self.fake),
            "this engine": lambda: self.run(self.session.model),
        }

    def against_float(self, repeats: int, **weight: Any) -> str:
        """Return the median milliseconds with other weights, and how many times as fast it is."""
        self.session.applier.apply(eight_bits(self.session, **weight))
        runs = self.runs()
        found = in_turn({name: runs[name] for name in ("float32", "this engine")}, repeats)
        self.session.applier.apply(self.recipe)
        return f"{found['this engine']:.0f}, {found['float32'] / found['this engine']:.1f}×"

    def switching(self, repeats: int) -> float:
        """Return the median milliseconds of going to another recipe whose weights are cached."""
        other = eight_bits(self.session, bits=6)
        turns = [other, self.recipe]
        with torch.no_grad():
            for recipe in turns:
                self.session.applier.apply(recipe)
                self.run(self.session.model)
        times = []
        for i in range(2 * repeats):
            start = time.perf_counter()
            self.session.applier.apply(turns[i % 2])
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def one_layer(self) -> str:
        """Return what a candidate that differs in one random layer costs, caches warm."""
        found = one_site_changed(self.session, rounds=9)
        self.session.applier.apply(self.recipe)
        return f"{found.speedup:.1f}× as fast ({found.full:.2f} s → {found.reusing:.2f} s)"

    def memory(self) -> float:
        """Return what the engine holds for one recipe, as a share of the float model's bytes.

        Weights as integers, packed and, where something computes in float, as real numbers.
        """
        slots = self.session.prepared.slots.values()
        held = sum(slot.held.bytes for slot in slots if slot.held is not None)
        return held / self.session.sizes.float_size_bytes


def line(cells: list[str]) -> str:
    """Return one row of a table."""
    return "| " + " | ".join(cells) + " |"


@click.command()
@click.option("--repeats", default=9, show_default=True, help="Runs of each, after a warm-up.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--quick", is_flag=True, help="On a GPU: compile nothing, write no report.")
@click.option("--simulate", is_flag=True, help="Try on the CPU what runs on a GPU: no measurement.")
@click.argument("names", nargs=-1)
def main(repeats: int, device: str, quick: bool, simulate: bool, names: tuple[str, ...]) -> None:
    """Measure and write the report of this kind of processor."""
    if device == "cuda" or simulate:
        from tests.benchmarks import gpu_evaluation

        gpu_evaluation.main(names, repeats, quick=quick, simulate=simulate)
        return
    with tempfile.TemporaryDirectory() as folder:
        benches = [Bench(c, Path(folder)) for c in CASES if not names or c.name in names]
    # First as a user's process is, then with freed memory kept, as ``autoquant search`` has it.
    plain = [
        in_turn({"float32": b.runs()["float32"], "this engine": b.runs()["this engine"]}, repeats)
        for b in benches
    ]
    kept = keep_freed_memory()
    rows = []
    more = []
    for bench, before in zip(benches, plain, strict=True):
        engine = bench.session.prepared.engine
        engine.reset()
        found = in_turn(bench.runs(), repeats)
        shares = engine.shares()
        whole = sum(share.seconds for share in shares.values())
        by = ", ".join(f"{100 * s.seconds / whole:.0f}% {name}" for name, s in shares.items())
        mine = found["this engine"]
        best = min(mine, before["this engine"])
        rows.append(
            [
                bench.case.title,
                f"{before['float32']:.0f}",
                *(f"{found[name]:.0f}" for name in bench.runs()),
                f"{before['float32'] / best:.1f}×",
                f"{found['float32'] / mine:.1f}×",
                f"{found['bfloat16'] / mine:.1f}×",
                f"{found['fake quantization'] / mine:.1f}×",
            ]
        )
        switch = bench.switching(repeats)
        more.append(
            [
                bench.case.title,
                f"{switch:.2f}",
                f"{100 * switch / mine:.1f}%",
                f"{bench.memory():.2f}×",
                by,
                bench.against_float(repeats, bits=8, scheme="asymmetric"),
                bench.against_float(repeats, bits=6),
                bench.against_float(repeats, bits=4, granularity="per_group_64")
                if bench.case.linear
                else "",
                bench.one_layer(),
            ]
        )
        print(line(rows[-1]), flush=True)
    head = [
        "one batch, W8A8",
        "float32 (as a user runs it)",
        "float32",
        "bfloat16",
        "fake quantization",
        "this engine",
        "against float32 as a user runs it",
        "against float32",
        "against bfloat16",
        "against fake quantization",
    ]
    head_more = [
        "",
        "switching to another recipe, ms",
        "of one batch",
        "held for one recipe, of the float model",
        "layers' time by backend",
        "W8A8 with zero points of weights: ms, against float32",
        "W6A8",
        "W4A8 in groups of 64",
        "a candidate with one other layer, on the search split",
    ]
    tables = [(head, rows), (head_more, more)]
    text = "\n\n".join(
        "\n".join([line(names), line(["---"] * len(names)), *map(line, cells)])
        for names, cells in tables
    )
    allocator = (
        "Freed memory is kept by the process (as `autoquant search` runs), but in the first column "
        "of times, which is float32 with the C library's own settings."
        if kept
        else "The C library's own settings for memory."
    )
    report = REPORTS / f"evaluation-{kind()}.md"
    report.write_text(
        "# Evaluating one candidate\n\n`python -m tests.benchmarks.evaluation`: milliseconds for "
        f"one batch, medians of {repeats}, taking turns in one process. {allocator} Fake "
        "quantization is PyTorch's operator before every layer, on weights that were quantized "
        f"beforehand.\n\n{text}\n\n{describe_machine()}\n",
        encoding="utf-8",
    )
    print(f"\n{text}")


if __name__ == "__main__":
    main()
