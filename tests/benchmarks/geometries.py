"""Random layers at each instruction set: ``python -m tests.benchmarks.geometries``.

At each level that ``ONEDNN_MAX_CPU_ISA`` can cap oneDNN to, 20,000 convolutions of random geometry
(half of them as networks have them, half odd), and 5,000 linear and recurrent layers are quantized,
computed by the fast path, and compared with the reference: how many are wrong, how many end the
process, and what share is refused. Nothing is known of the machine beforehand. Then the
convolutions of four networks are timed beside float32. ``--levels``, ``--convolutions`` and
``--others`` do less; levels already measured are kept beside the report's rows, in
``reports/geometries.jsonl``, unless ``--anew``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.heap import keep_freed_memory
from autoquant.kernels.cpu import instructions, onednn
from autoquant.kernels.cpu.geometry import may_be_tried
from autoquant.kernels.engine import make_engine
from autoquant.kernels.operation import LINEAR, Operation
from autoquant.kernels.reference import multiply, reference
from autoquant.methods.applier import Applier
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.user_cache import processor_name
from tests.benchmarks.machine import describe_machine
from tests.kernels.cases import calibrated, quantized

REPORTS = Path(__file__).resolve().parents[2] / "reports"
LEVELS = ("SSE41", "AVX2", "AVX512_CORE", "AVX2_VNNI", "AVX512_CORE_VNNI", "AVX10_1_512", "DEFAULT")
CPU = torch.device("cpu")
TOLERANCE = 1e-5
IMAGES = 4
ROUNDS = 5
Conv = tuple[Operation, tuple[int, ...], tuple[int, ...]]
"""An operation, and the shapes of its weight and its activation."""


def random_convolution(seed: int) -> Conv:
    """Return the same convolution for the same seed; every second one as networks have them."""
    d = random.Random(seed)
    common = seed % 2 == 0
    axes = d.choice((1, 2, 2, 2, 2, 3))

    def each(*n: int) -> tuple[int, ...]:
        return tuple(d.choice(n) for _ in range(axes))

    kind = d.choice(("plain", "plain", "grouped", "depthwise"))
    groups, ins, outs = 1, d.choice((1, 3, 4, 8, 16, 17, 32, 64, 96)), d.choice((1, 3, 8, 17, 64))
    if kind == "grouped":
        groups, ins = d.choice((2, 3, 4, 8, 32)), d.choice((1, 2, 3, 4, 8, 16, 17))
        outs = d.choice((1, 2, 3, 4, 8, 16, 17))
    elif kind == "depthwise":
        groups, ins, outs = d.choice((2, 3, 8, 16, 17, 32, 64, 96)), 1, 1
    if common:
        k = d.choice((1, 3, 3, 5, 7))
        kernel, padding = (k,) * axes, (k // 2,) * axes
        stride, dilation = (d.choice((1, 1, 2)),) * axes, (1,) * axes
        size = (d.choice((4, 6, 8) if axes == 3 else (7, 8, 14, 16, 28, 32, 56)),) * axes
    else:
        kernel = each(1, 2, 3, 5, 7) if axes == 3 else each(1, 2, 3, 3, 4, 5, 7, 11)
        stride, dilation = each(1, 1, 2, 3, 4), each(1, 1, 1, 2, 3)
        padding = each(0, 1, 2, 3, 5)
        size = each(1, 2, 3, 5, 8) if axes == 3 else each(1, 2, 3, 4, 5, 7, 8, 11, 14, 16, 23, 33)
    o = Operation(f"conv{axes}d", stride, padding, dilation, groups)
    return o, (groups * outs, ins, *kernel), (d.choice((1, 2, 3)), groups * ins, *size)


def has_output(conv: Conv) -> bool:
    """Return whether a convolution gives any number."""
    o, weight, x = conv
    axes = zip(x[2:], o.padding, o.dilation, weight[2:], strict=True)
    return all(n + 2 * p >= d * (k - 1) + 1 for n, p, d, k in axes)


def scheme_of(d: random.Random) -> ActivationScheme:
    """Return an activation scheme, without a scale where it is static."""
    granularity = d.choice(("per_tensor", "per_tensor", "per_token"))
    return ActivationScheme(
        d.choice((8, 8, 8, 6)), granularity, d.choice(("symmetric", "asymmetric"))
    )


def try_one(seed: int, operation: Operation, w_shape: Any, x_shape: Any) -> str:
    """Return ``right``, ``wrong``, or by what a layer was refused."""
    d = random.Random(-seed)
    x, w = torch.randn(x_shape) * 3 + 0.5, torch.randn(w_shape)
    if x.dim() == 4 and d.random() < 0.5:
        x = x.contiguous(memory_format=torch.channels_last)
    scheme = calibrated(scheme_of(d), x)
    weight = quantized(w, WeightScheme(d.choice((8, 8, 7, 6, 4, 2))))
    bias = torch.randn(w_shape[0]) if d.random() < 0.5 else None
    clamp = d.choice((None, (0.0, math.inf), (0.0, 6.0)))
    product = onednn.prepare(operation, weight, scheme)
    if product is None:
        return "refused: integers"
    y = product(x, bias, clamp)
    if y is None:
        known = isinstance(product, onednn.ConvProduct) and not may_be_tried(
            product.geometry(x_shape, torch.get_num_threads())
        )
        return "refused: rule" if known else "refused: verdict"
    exact = reference(operation, x, weight, scheme, bias)
    size = max(float(exact.abs().max()), 0.0 if bias is None else float(bias.abs().max()))
    exact = exact if clamp is None else exact.clamp(*clamp)
    return "right" if float((y - exact).abs().max()) <= TOLERANCE * size else "wrong"


def try_convolution(seed: int) -> str:
    """Return what became of one random convolution."""
    conv = random_convolution(seed)
    return try_one(seed, *conv) if has_output(conv) else "no output"


def try_other(seed: int) -> str:
    """Return what became of one random linear layer, or every fifth time a recurrent one."""
    d = random.Random(seed)

    def size(most: int) -> int:
        return d.choice((d.randint(1, 20), d.randint(1, 130), d.choice((32, 64, 256)), most))

    if seed % 5:
        rows, ins, outs = (
            size(d.randint(1, 2000)),
            size(d.randint(1, 2000)),
            size(d.randint(1, 900)),
        )
        rows = max(1, min(rows, 10**8 // (ins * outs)))
        return try_one(seed, LINEAR, (outs, ins), (rows, ins))
    kind = d.choice((nn.LSTM, nn.GRU, nn.RNN))
    layer = kind(size(40), size(40), d.choice((1, 2)), bidirectional=d.random() < 0.3)
    x = torch.randn(d.randint(1, 12), d.randint(1, 9), layer.input_size)
    engine = make_engine(CPU)
    prepared = prepare(layer, lambda m: m(x), engine=engine)
    applier = Applier(prepared, calibrate(prepared, [x], lambda m, x: m(x)))
    bits, activation = d.choice((8, 7, 4)), ActivationScheme(8, "per_token", "asymmetric")
    applier.apply({n: SiteRecipe(WeightScheme(bits), activation) for n in prepared.slots})
    engine.reset()
    y = layer(x)[0]
    fast = "int8" in engine.shares()
    with engine.reference():
        exact = layer(x)[0]
    # Where a state lies next to the middle between two integers, all that follow differ a little.
    right = float((y - exact).abs().median()) <= 1e-4 and float((y - exact).abs().max()) <= 0.1
    return "wrong" if not right else "right" if fast else "refused: integers"


TRIES = {"convolutions": try_convolution, "others": try_other}


def child(what: str, start: int, stop: int, path: Path) -> None:
    """Try a range of seeds; write a line before each, and what became of it after."""
    torch.set_grad_enabled(False)
    with path.open("a", encoding="utf-8", buffering=1) as file:
        for seed in range(start, stop):
            torch.manual_seed(seed)
            file.write(f"{seed} ")
            file.flush()
            with torch.enable_grad() if what == "others" and not seed % 5 else torch.no_grad():
                file.write(TRIES[what](seed) + "\n")


def outcomes(level: str, what: str, count: int, cache: str) -> Counter[str]:
    """Return how often what happened, of ``count`` layers that have an output."""
    environment = environment_of(level, cache)
    found: Counter[str] = Counter()
    start = 0
    while found.total() < count:
        stop = start + max(200, math.ceil((count - found.total()) / 0.7))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lines"
            arguments = ["--child", what, "--start", str(start), "--stop", str(stop), str(path)]
            subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.geometries", *arguments],
                env=environment,
                check=False,
            )
            lines = path.read_text(encoding="utf-8").splitlines()
        for line in lines:
            seed, _, outcome = line.partition(" ")
            start = int(seed) + 1
            if found.total() < count and outcome != "no output":
                kind = "" if what == "others" else "common, " if int(seed) % 2 == 0 else "odd, "
                found[kind + (outcome or "crashed")] += 1
    return found


def environment_of(level: str, cache: str) -> dict[str, str]:
    """Return the environment of a process at one level, with an empty cache."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ONEDNN_", "DNNL_"))}
    ours = {"ONEDNN_MAX_CPU_ISA": level, "XDG_CACHE_HOME": cache}
    return {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"} | inherited | ours


def square(kernel: int, stride: int, ins: int, outs: int, size: int, groups: int = 1) -> Conv:
    """Return a convolution of pictures as networks have them."""
    pad = kernel // 2
    o = Operation("conv2d", (stride, stride), (pad, pad), (1, 1), groups)
    return o, (outs, ins // groups, kernel, kernel), (IMAGES, ins, size, size)


def bottlenecks(width: int, groups: int) -> Iterator[Conv]:
    """Yield the convolutions of a residual network of 50 layers."""
    yield square(7, 2, 3, 64, 224)
    ins = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        mid, outs, size = width << stage, 256 << stage, 56 >> stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            yield square(1, 1, ins, mid, size * stride)
            yield square(3, stride, mid, mid, size * stride, groups)
            yield square(1, 1, mid, outs, size)
            if not block:
                yield square(1, stride, ins, outs, size * stride)
            ins = outs


def inverted_residuals() -> Iterator[Conv]:
    """Yield the convolutions of MobileNetV2."""
    yield square(3, 2, 3, 32, 224)
    ins, size = 32, 112
    for expansion, outs, blocks, first in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
        (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for block in range(blocks):
            stride, mid = first if not block else 1, ins * expansion
            if expansion > 1:
                yield square(1, 1, ins, mid, size)
            yield square(3, stride, mid, mid, size, mid)
            size //= stride
            yield square(1, 1, mid, outs, size)
            ins = outs
    yield square(1, 1, 320, 1280, 7)


def dilated() -> Iterator[Conv]:
    """Yield convolutions whose rows are dilated, as networks that segment pictures have them."""
    for dilation in (2, 4, 6, 12, 18):
        o = Operation("conv2d", (1, 1), (dilation,) * 2, (dilation,) * 2)
        yield o, (256, 256, 3, 3), (IMAGES, 256, 28, 28)


NETWORKS = {
    "MobileNetV2": inverted_residuals,
    "ResNet-50": lambda: bottlenecks(64, 1),
    "ResNeXt-50 (32 groups)": lambda: bottlenecks(128, 32),
    "dilated 3×3": dilated,
}


def time_networks() -> dict[str, Any]:
    """Return milliseconds of each network's convolutions: 8-bit with refusals, and float32."""
    bits = 8 if instructions.has_vnni() else 7
    rows: dict[str, Any] = {
        "bits": bits,
        "vnni": instructions.has_vnni(),
        "amx": instructions.has_amx(),
    }
    for name, convolutions in NETWORKS.items():
        eight = wide = 0.0
        refused = count = 0
        known: dict[Conv, tuple[float, float, bool]] = {}
        for conv in convolutions():
            if conv not in known:
                known[conv] = time_one(*conv, bits)
            fast, slow, taken = known[conv]
            eight += fast if taken else slow
            wide += slow
            refused += not taken
            count += 1
        rows[name] = {"eight": eight, "float": wide, "refused": refused, "layers": count}
    return rows


def time_one(
    operation: Operation, w_shape: Any, x_shape: Any, bits: int
) -> tuple[float, float, bool]:
    """Return milliseconds in integers, quantizing included, and in float; whether it is taken."""
    last = torch.channels_last
    x = torch.randn(x_shape).contiguous(memory_format=last)
    w = torch.randn(w_shape).contiguous(memory_format=last)
    scheme = calibrated(ActivationScheme(8, scheme="asymmetric"), x)
    product = onednn.prepare(operation, quantized(w, WeightScheme(bits)), scheme)
    assert product is not None
    taken = product(x, None) is not None
    fast = milliseconds(lambda: product(x, None)) if taken else math.nan
    return fast, milliseconds(lambda: multiply(operation, x, w, None)), taken


def milliseconds(call: Any) -> float:
    """Return the least of some calls: what others do on the machine only adds to it."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def measure(level: str, convolutions: int, others: int) -> dict[str, Any]:
    """Return all that one level gives."""
    with tempfile.TemporaryDirectory() as cache:
        row: dict[str, Any] = {"level": level, "processor": processor_name()}
        row["convolutions"] = outcomes(level, "convolutions", convolutions, cache)
        row["others"] = outcomes(level, "others", others, cache)
        command = [sys.executable, "-m", "tests.benchmarks.geometries", "--child", "networks"]
        environment = environment_of(level, cache)
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        row["networks"] = json.loads(done.stdout.splitlines()[-1])
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the report."""
    lines = [
        "# Geometries", "", "`python -m tests.benchmarks.geometries`", "",
        "Random layers through the fast path beside the reference, at each instruction set that",
        "oneDNN can be capped to (`ONEDNN_MAX_CPU_ISA`; DEFAULT is no cap). *Refused* layers are",
        "computed by the reference: *integers*, because a sum may not be exact (two 8-bit operands",
        "without VNNI); *rule*, a form that is known to read or write astray; *verdict*, a",
        "comparison in a child process that came out wrong, or that killed it.", "",
    ]  # fmt: skip
    for what, title in (
        ("convolutions", "Convolutions"),
        ("others", "Linear and recurrent layers"),
    ):
        lines += [
            f"## {title}",
            "",
            "| processor, level | layers | wrong | crashed | refused: integers | rule | verdict |",
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in rows:
            kinds = ("",) if what == "others" else ("common, ", "odd, ")
            for kind in kinds:
                found = {
                    k.removeprefix(kind): n for k, n in row[what].items() if k.startswith(kind)
                }
                total = sum(found.values())
                shares = [
                    f"{100 * found.get(f'refused: {why}', 0) / total:.1f}%"
                    for why in ("integers", "rule", "verdict")
                ]
                name = f"{row['processor']}, {row['level']}" + (f", {kind[:-2]}" if kind else "")
                cells = (
                    name,
                    f"{total:,}",
                    found.get("wrong", 0),
                    found.get("crashed", 0),
                    *shares,
                )
                lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    lines += [f"## What it costs: the convolutions of networks, {IMAGES} pictures", ""]
    lines += [
        "Milliseconds with 8-bit activations and weights (7-bit ones without VNNI), refused",
        "layers in float; beside float32.",
        "",
    ]
    lines += [
        "| processor, level | network | layers | refused | 8-bit, ms | float32, ms | faster |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        for name in NETWORKS:
            n = row["networks"][name]
            cells = (
                f"{row['processor']}, {row['level']}", name, str(n["layers"]), str(n["refused"]),
                f"{n['eight']:.1f}", f"{n['float']:.1f}", f"{n['float'] / n['eight']:.1f} ×",
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", describe_machine(), ""])


def main() -> None:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--levels", nargs="+", default=list(LEVELS))
    parser.add_argument("--convolutions", type=int, default=20_000)
    parser.add_argument("--others", type=int, default=5_000)
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--child", choices=[*TRIES, "networks"])
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--stop", type=int, default=0)
    parser.add_argument("path", nargs="?", type=Path)
    options = parser.parse_args()
    if options.child == "networks":
        keep_freed_memory()
        with torch.no_grad():
            print(json.dumps(time_networks()))
        return
    if options.child:
        child(options.child, options.start, options.stop, options.path)
        return
    kept = REPORTS / "geometries.jsonl"
    rows = [] if options.anew or not kept.exists() else [json.loads(s) for s in kept.open()]
    done = {(row["processor"], row["level"]) for row in rows}
    for level in options.levels:
        if (processor_name(), level) in done:
            continue
        rows.append(measure(level, options.convolutions, options.others))
        kept.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        text = markdown(rows)
        (REPORTS / "geometries.md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
