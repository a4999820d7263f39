"""What one candidate may cost on a GPU, without one: ``python -m tests.benchmarks.gpu_prediction``.

Launches of a replayed forward are counted at full size (``gpu_counting``), and a simple model of an
H200 gives each a time: a fixed gap, and the longer of its bytes by the memory's rate and its
operations by the rate of its kind. It is held against two programs that were measured on an H200.
Beside it, measured here: what the host spends on a candidate (``gpu_host``). Writes
``reports/gpu-prediction.md``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from torch import Tensor

from tests.benchmarks.evaluation import line
from tests.benchmarks.gpu_counting import (
    ADDING,
    ATTENTION,
    DEPTHWISE,
    KINDS,
    NORMS,
    OTHER,
    PRODUCT,
    QUANTIZING,
    Step,
    candidate,
    interpreted,
    steps_of,
)
from tests.benchmarks.gpu_evaluation import ABSENT
from tests.benchmarks.gpu_host import HostCost, forward_ms, measure
from tests.benchmarks.gpu_models import MODELS, Sized
from tests.benchmarks.machine import describe_machine

REPORT = Path(__file__).resolve().parents[2] / "reports" / "gpu-prediction.md"
NAMES = ("encoder", "resnet50", "mobilenet_v2")
ZOO = ("resnext", "g2p")


@dataclass(frozen=True)
class Rates:
    """A GPU as the prediction has it: seconds between kernels of a graph, and rates a second.

    - ``memory``: bytes; what an H200 keeps up of its 4.8 TB/s.
    - ``products``: int8 operations, 70% of the 942 TOPS that a large product was measured at.
    - ``depthwise``: operations on the CUDA cores, a third of the peak of int32 multiply-adds
      (132 multiprocessors × 64 a cycle × 1.98 GHz).
    - ``attention``: operations of attention in float32, a guess: three products of TF32 for each
      at half of the rate that large ones reach, and half of that for short sequences.
    """

    gap: float = 1.75e-6
    memory: float = 4.0e12
    products: float = 0.7 * 942e12
    depthwise: float = 11e12
    attention: float = 40e12

    def seconds(self, step: Step) -> float:
        """Return the time of one launch."""
        rate = {DEPTHWISE: self.depthwise, ATTENTION: self.attention}.get(step.kind, self.products)
        return self.gap + max((step.read + step.written) / self.memory, step.operations / rate)

    def ms(self, steps: Iterable[Step]) -> float:
        """Return the milliseconds of launches one after the other."""
        return 1e3 * sum(map(self.seconds, steps))


H200 = Rates()


# --- programs that were measured on an H200 -------------------------------------------------------


def encoder_by_hand() -> list[Step]:
    """Return the launches of a hand-made BERT-base on 32 × 128 tokens, activations in bfloat16.

    int8 comes from whatever produces it; query, key and value are one product, attention is one
    kernel on bfloat16, and so is a residual addition with its norm and its int8.
    """
    m, e, f, layers = 32 * 128, 768, 3072, 12

    def norm() -> Step:
        return Step("norm", NORMS, 4 * m * e, 3 * m * e)

    def product(n: int, k: int, size: int) -> Step:
        return Step("product", PRODUCT, m * k + n * k, m * n * size, 2 * m * n * k)

    gather = [Step("gather", OTHER, 2 * m * e, 2 * m * e) for _ in range(4)]
    layer = [
        product(3 * e, e, 2),
        Step("attention", ATTENTION, 6 * m * e, m * e),  # tensor cores: its bytes count
        product(e, e, 2),
        norm(),
        product(f, e, 1),
        product(e, f, 2),
        norm(),
    ]
    return [*gather, norm(), *layer * layers]


def resnet_by_hand() -> list[Step]:
    """Return the launches of a hand-made ResNet-50 on 64 photos, int8 from layer to layer.

    Residual connections are int8 too, added where a convolution ends; the stem is a product over
    2 × 2 pixels at a time.
    """
    n = 64
    steps: list[Step] = []

    def conv(side: int, inputs: int, outputs: int, kernel: int, stride: int, more: int = 0) -> int:
        out = side // stride
        m, k = n * out * out, inputs * kernel**2
        met = m * inputs if kernel == 1 else n * side * side * inputs
        steps.append(
            Step("convolution", PRODUCT, met + k * outputs + more, m * outputs, 2 * m * k * outputs)
        )
        return out

    packed, stem = n * 115**2 * 16, n * 112**2 * 64
    steps.append(Step("stem's input", QUANTIZING, 4 * n * 3 * 224**2, packed))
    steps.append(Step("stem", PRODUCT, packed, stem, 2 * n * 112**2 * 64 * 256))
    steps.append(Step("pool", OTHER, stem, n * 56**2 * 64))
    side, inputs = 56, 64
    for stage, count in enumerate((3, 4, 6, 3)):
        inner = 64 << stage
        for i in range(count):
            stride = 2 if stage and not i else 1
            conv(side, inputs, inner, 1, 1)
            out = conv(side, inner, inner, 3, stride)
            if not i:
                conv(side, inputs, 4 * inner, 1, stride)
            conv(out, inner, 4 * inner, 1, 1, more=n * out * out * 4 * inner)
            side, inputs = out, 4 * inner
    last = n * 49 * 2048
    steps += [Step("to float32", OTHER, last, 4 * last), Step("add", OTHER, 4 * last, 4 * last)]
    steps += [Step("multiply", OTHER, 4 * last, 4 * last), Step("mean", OTHER, 4 * last, n * 8192)]
    return [*steps, Step("head", OTHER, n * 8192 + 8_192_000, n * 4000)]


@dataclass(frozen=True)
class Known:
    """Milliseconds of a program that was measured on an H200, whole and by kinds."""

    title: str
    steps: Callable[[], list[Step]]
    whole: float
    parts: dict[str, float]


KNOWN = {
    "encoder": Known(
        "BERT-base by hand, rest in bfloat16",
        encoder_by_hand,
        1.53,
        {PRODUCT: 1.07, ATTENTION: 0.19, NORMS: 0.18},
    ),
    "resnet50": Known("ResNet-50 by hand, all in int8", resnet_by_hand, 2.10, {}),
}
CLOSEST = {"encoder": "encoder", "resnet50": "resnet50", "mobilenet_v2": "resnet50"}
"""Which known program is most like a model."""


def surplus(name: str, rates: Rates = H200) -> float:
    """Return how many milliseconds longer than foretold the known program closest to a model took.

    For each operation of its products, which all of it is put down to.
    """
    known = KNOWN[CLOSEST[name]]
    steps = known.steps()
    return (known.whole - rates.ms(steps)) / operations(steps)


def operations(steps: Iterable[Step]) -> int:
    """Return the operations of products."""
    return sum(s.operations for s in steps if s.kind == PRODUCT)


# --- the models -----------------------------------------------------------------------------------


def counted(case: Sized) -> list[Step]:
    """Return what one replayed forward of a candidate launches at full size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = case.build().eval()
        few: Tensor = case.inputs(2, min(case.sizes[1], 64))
    shape = torch.Size((case.sizes[0], *few.shape[1:-2], *[case.sizes[1]] * min(few.dim() - 1, 2)))
    with interpreted():
        return steps_of(candidate(model, few), shape, few)


def fused(steps: Sequence[Step], rates: Rates = H200) -> float:
    """Return the milliseconds that are left where additions have no launches of their own.

    A product adds the other tensor where it ends, so it reads that, too, and writes int8 beside the
    float32 sum; a ReLU of the sum and quantizing it cost no pass. Before a layer norm one kernel
    adds, normalizes and writes both.
    """
    left = 0.0
    sums: set[int] = set()
    for step in steps:
        of_sum = bool(step.sources & sums)
        adds = step.name in ("add", "add_")
        if adds or (of_sum and step.kind in (ADDING, NORMS)):
            sums |= step.results
        if adds:
            left += step.written / rates.memory
        elif of_sum and step.kind == NORMS:
            left += rates.gap + 2 * step.written / rates.memory
        elif of_sum and step.name == "quantize_flat":
            left += step.written / rates.memory
        elif not (of_sum and step.kind == ADDING):
            left += rates.seconds(step)
    return 1e3 * left


def quantized_once(steps: Sequence[Step]) -> list[Step]:
    """Return what is left where no tensor is quantized twice."""
    seen: set[frozenset[int]] = set()
    left = []
    for step in steps:
        if step.name == "quantize_flat":
            if step.sources in seen:
                continue
            seen.add(step.sources)
        left.append(step)
    return left


# --- the report -----------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows below a heading."""
    return "\n".join(line(list(r)) for r in (head, ["---"] * len(head), *rows))


def by(steps: Sequence[Step], key: Callable[[Step], str]) -> dict[str, list[Step]]:
    """Return steps by what ``key`` says of each."""
    found = defaultdict(list)
    for step in steps:
        found[key(step)].append(step)
    return dict(found)


HEAD = ("", "launches", "GB read", "GB written", "TOP", "ms")


def cells(name: str, steps: Sequence[Step], rates: Rates) -> list[str]:
    """Return one row."""
    return [
        name,
        f"{len(steps)}",
        f"{sum(s.read for s in steps) / 1e9:.3f}",
        f"{sum(s.written for s in steps) / 1e9:.3f}",
        f"{sum(s.operations for s in steps) / 1e12:.3f}",
        f"{rates.ms(steps):.2f}",
    ]


def section(case: Sized, steps: Sequence[Step], host: float, rates: Rates = H200) -> str:
    """Return what is foretold for one model; ``host`` are the host's milliseconds, measured."""
    whole, known = rates.ms(steps), KNOWN[CLOSEST[case.name]]
    more = surplus(case.name, rates) * operations(steps)
    kinds = by(steps, lambda s: s.kind)
    rows = [cells(kind, kinds[kind], rates) for kind in KINDS if kind in kinds]
    kernels = by(steps, lambda s: s.name)
    long = sorted(kernels, key=lambda n: -rates.ms(kernels[n]))
    slack = [replace(rates, gap=gap * 1e-6).ms(steps) for gap in (1.5, 2.0)]
    busiest = sorted(kinds, key=lambda kind: -rates.ms(kinds[kind]))[:3]
    lines = [
        f"Foretold: **{whole:.2f} ms** ({slack[0]:.2f} to {slack[1]:.2f} by gaps of 1.5 to 2 µs); "
        f"**{whole + more:.2f} ms** if products take as much longer for each operation as in "
        f"*{known.title}*. Target: {case.target} ms.",
        "Longest: "
        + ", ".join(f"{kind} {rates.ms(kinds[kind]) / whole:.0%}" for kind in busiest)
        + ".",
    ]

    def without(what: str, left: float) -> None:
        if left < whole - 0.005:
            lines.append(f"{what}: {left:.2f} ms, or {left + more:.2f}.")

    without(
        "If additions, the ReLUs and norms after them, and quantizing what comes of them were "
        "parts of the kernels beside them",
        fused(steps, rates),
    )
    once = quantized_once(steps)
    without("If no tensor were quantized twice", rates.ms(once))
    without("If both were so", fused(once, rates))
    for kind in (ATTENTION, DEPTHWISE):
        if kind in kinds:
            field = kind.split()[0]
            changed = (replace(rates, **{field: getattr(rates, field) * f}) for f in (0.5, 2))
            half, double = (r.ms(steps) for r in changed)
            lines.append(f"With half the rate of {kind}: {half:.2f} ms; with double: {double:.2f}.")
    lines.append(
        f"Beside it the host takes {host:.2f} ms of this CPU (measured, a replay that does nothing)"
        " before and after each replay."
    )
    return (
        f"## {case.title}\n\n"
        + table(HEAD, [*rows, cells("all", steps, rates)])
        + "\n\n"
        + "\n".join(f"- {text}" for text in lines)
        + "\n\n"
        + table(HEAD, [cells(f"`{name}`", kernels[name], rates) for name in long])
    )


def calibration(rates: Rates = H200) -> str:
    """Return how far off the model of time is for programs that were measured."""
    rows = []
    for known in KNOWN.values():
        steps = known.steps()
        whole = rates.ms(steps)
        rows.append([known.title, f"{len(steps)}", f"{whole:.2f}", f"{known.whole:.2f}"])
        rows[-1].append(f"{known.whole / whole:.2f}")
        for kind, measured in known.parts.items():
            part = [s for s in steps if s.kind == kind]
            ms = rates.ms(part)
            cell = [f"of it {kind}", f"{len(part)}", f"{ms:.2f}", f"{measured:.2f}"]
            rows.append([*cell, f"{measured / ms:.2f}"])
    head = ("", "launches", "foretold, ms", "measured on an H200, ms", "measured / foretold")
    return table(head, rows)


def host_table(costs: Sequence[HostCost]) -> str:
    """Return what the host spends on a candidate."""
    head = (
        *("", "layers", "batches", "replays", "switching, ms", "programs, ms"),
        *("metric and divergence, ms", "sampler and journal, ms", "all, ms"),
        *("at most, candidates a second", "this CPU computing them, a second", "ratio"),
    )
    rows = []
    for c in costs:
        most = 1e3 / c.whole
        parts = (c.switching, c.programs, c.reading, c.sampler, c.whole)
        row = [c.name, f"{c.layers}", f"{c.batches}", f"{c.replays}", *(f"{p:.2f}" for p in parts)]
        rows.append([*row, f"{most:.0f}", f"{c.cpu:.1f}", f"{most / c.cpu:.1f}×"])
    said = [f"\n- {c.name}: {text}" for c in costs for text in c.said]
    return table(head, rows) + ("\n" + "".join(said) if said else "")


FIRST = (
    "**Nothing on this page was measured on a GPU, but for the two programs that the prediction is "
    "held against.**"
)
RATES = (
    "`python -m tests.benchmarks.gpu_prediction`: all layers W8A8 with static scales, the rest in "
    "float32; what one replayed forward launches, counted at full size, and what an H200 would "
    "take by a simple model. A launch takes {gap:.2f} µs, and the longer of its bytes at "
    "{memory:.1f} TB/s and its operations: int8 products at {products:.0f} TOPS (70% of the 942 "
    "that a large one was measured at), depthwise convolutions at {depthwise:.0f} (CUDA cores, a "
    "third of their peak: a guess), attention in float32 at {attention:.0f} TFLOPS (a guess). "
    "Every tensor is counted once for each kernel that reads or writes it. Not modelled: the L2 "
    "cache, which holds much of what BERT's layers hand on; gathers of few bytes, as in a stem of "
    "3 channels (one by hand took 0.25 ms, and 0.07 over 2 × 2 pixels side by side); epilogues (a "
    "GELU made a product of 28 µs one of 37); products too small to fill the GPU."
)


def report(sections: Sequence[str], costs: Sequence[HostCost]) -> str:
    """Return the whole page."""
    r = H200
    rates = RATES.format(
        gap=r.gap * 1e6,
        memory=r.memory / 1e12,
        products=r.products / 1e12,
        depthwise=r.depthwise / 1e12,
        attention=r.attention / 1e12,
    )
    host = (
        "## What the host spends on a candidate, measured on a CPU\n\nMilliseconds of this "
        "process's processor time, one thread, medians: no waiting for a disk or a device. A "
        "recorder whose replay does nothing stands in for the GPU; launching graphs, waiting for "
        "them and products of modules that can't be recorded are not in it, so candidates a second "
        "on a GPU are fewer than *at most*. This CPU, too, computes on one thread.\n\n"
        + host_table(costs)
    )
    parts = [
        "# What a GPU may make of a candidate",
        FIRST,
        rates,
        "## How far off the model is where it is known\n\nTwo hand-written programs, measured "
        "before on one H200 with torch 2.11 and Triton 3.6; their launches follow from their "
        "sizes.\n\n" + calibration(),
        *sections,
        *([host] if costs else []),
        describe_machine(),
    ]
    return "\n\n".join(parts) + "\n"


@click.command()
@click.option("--write/--no-write", default=True, help="Write the report.")
@click.argument("names", nargs=-1, type=click.Choice((*NAMES, *ZOO)))
def main(write: bool, names: tuple[str, ...]) -> None:
    """Count, foretell, measure the host, and write the report."""
    torch.set_num_threads(1)
    wanted = names or (*NAMES, *ZOO)
    sections = []
    for name in (n for n in NAMES if n in wanted):
        sections.append(section(MODELS[name], counted(MODELS[name]), forward_ms(MODELS[name])))
        print(sections[-1], end="\n\n", flush=True)
    costs = []
    for name in (n for n in ZOO if n in wanted):
        try:
            costs.append(measure(name))
        except ABSENT as error:
            print(f"{name} is left out: {error}")
    text = report(sections, costs)
    if write and not names:
        REPORT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
