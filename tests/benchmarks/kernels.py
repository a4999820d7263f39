"""How fast the integer kernels are: ``python -m tests.benchmarks.kernels``.

On a GPU: linear layers of BERT-base at batch 32 × 128 tokens with 8-bit weights and activations,
against bfloat16 and ``torch._int_mm`` (cuBLAS); linear layers with 4-bit weights on one token; the
convolutions of ResNet-50 at batch 64, against bfloat16 channels-last (cuDNN). The calls of a row
take turns, each after the L2 cache was overwritten; numbers are medians. The peak is a large
``torch._int_mm``. On a CPU: the CPU backend, where there is one. Writes ``reports/kernels.md``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from autoquant.kernels.operation import LINEAR, Backend, Operation
from autoquant.quant.affine import choose_qparams, quantize
from autoquant.quant.blocks import from_blocks, to_blocks, to_matrix
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import ActivationScheme, WeightScheme
from tests.benchmarks.machine import describe_machine

REPORT = Path(__file__).resolve().parents[2] / "reports" / "kernels.md"
ROUNDS = 50
TOKENS = 32 * 128
LINEARS = ((768, 768), (768, 3072), (3072, 768))
"""(inputs, outputs) of BERT-base's layers."""
VECTORS = (*LINEARS, (4096, 4096), (4096, 11008))
"""The last two are a 7-billion-parameter language model's, which do not fit into an L2 cache."""
PEAK = 8192
IMAGES = 64
W8 = WeightScheme(8, "per_channel", "symmetric")
W4 = WeightScheme(4, "per_group_128", "asymmetric")
A8 = ActivationScheme(8, "per_tensor", "asymmetric", scale=0.04, zero_point=-3)
A8_TOKEN = ActivationScheme(8, "per_token", "asymmetric")


@dataclass(frozen=True)
class Conv:
    """A convolution of ResNet-50: channels in and out, kernel, stride, and the input's size."""

    channels: int
    outputs: int
    kernel: int
    stride: int
    size: int

    @property
    def operation(self) -> Operation:
        """What the kernels are told."""
        pad = self.kernel // 2
        return Operation("conv2d", (self.stride,) * 2, (pad, pad), (1, 1))

    @property
    def operations(self) -> int:
        """Multiplications and additions of a batch."""
        pixels = (self.size // self.stride) ** 2 * IMAGES
        return 2 * pixels * self.outputs * self.channels * self.kernel**2


CONVS = (
    Conv(3, 64, 7, 2, 224),
    Conv(64, 64, 3, 1, 56),
    Conv(64, 256, 1, 1, 56),
    Conv(128, 128, 3, 2, 56),
    Conv(128, 128, 3, 1, 28),
    Conv(256, 256, 3, 1, 14),
    Conv(1024, 256, 1, 1, 14),
    Conv(512, 512, 3, 1, 7),
    Conv(2048, 512, 1, 1, 7),
)


CPU_LINEARS = ((4096, 384, 384), (4096, 384, 1536), (4096, 1536, 384), (4096, 1024, 1024))
"""Rows, inputs and outputs of linear layers on a CPU: MiniLM at 64 × 64 tokens, and a large one."""
CPU_IMAGES = 8
"""Images of a convolution on a CPU."""
CPU_ROUNDS = 9
WEIGHT = WeightScheme(8)


@dataclass(frozen=True)
class Table:
    """Rows of text below a heading."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [f"## {self.title}", "", _line(self.header), "|" + "---|" * len(self.header)]
        return "\n".join(lines + [_line(row) for row in self.rows]) + "\n"


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def quantized(weight: Tensor, scheme: WeightScheme) -> QuantizedWeight:
    """Return ``weight`` rounded to the nearest point of the grid of its range."""
    matrix = to_matrix(weight, 0)
    blocks = to_blocks(matrix, scheme.granularity)
    lo, hi = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    p = choose_qparams(lo, hi, scheme.bits, symmetric=scheme.symmetric)
    q = from_blocks(quantize(blocks, p), (matrix.shape[0], matrix.shape[1]))
    return QuantizedWeight(q, p, scheme, tuple(weight.shape), 0)


def milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median milliseconds of each call on the GPU; the calls take turns."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


def peak() -> float:
    """Return the operations a second of a large product of int8 matrices by cuBLAS."""
    a = torch.randint(-128, 128, (PEAK, PEAK), dtype=torch.int8, device="cuda")
    times = milliseconds({"peak": lambda: torch._int_mm(a, a.T)})
    return 2 * PEAK**3 / times["peak"] * 1e3


def linear_table(backend: Backend, most: float) -> Table:
    """Time 8-bit linear layers: whole, the product alone, cuBLAS's product, bfloat16."""
    from autoquant.kernels.gpu import linear
    from autoquant.kernels.gpu.integers import integer_activation

    rows = []
    for inputs, outputs in LINEARS:
        x, w = torch.randn(TOKENS, inputs).cuda(), torch.randn(outputs, inputs).cuda()
        bias, weight = torch.randn(outputs).cuda(), quantized(w, W8)
        static = _product(backend, LINEAR, weight, A8, x)
        token = _product(backend, LINEAR, weight, A8_TOKEN, x)
        integers = integer_activation(A8, x.device)
        assert integers is not None
        q = linear.quantize(x, integers, inputs)
        half, half_w, half_bias = x.bfloat16(), w.bfloat16(), bias.bfloat16()
        t = milliseconds(
            {
                "static": lambda f=static, x=x, bias=bias: f(x, bias),
                "token": lambda f=token, x=x, bias=bias: f(x, bias),
                "quantizing": lambda x=x, a=integers, n=inputs: linear.quantize(x, a, n),
                "cublas": lambda q=q, w=weight: torch._int_mm(q.q, w.q.T),
                "bfloat16": lambda x=half, w=half_w, b=half_bias: F.linear(x, w, b),
            }
        )
        product = t["static"] - t["quantizing"]
        share = 2 * TOKENS * inputs * outputs / (product / 1e3) / most
        rows.append(
            (
                f"{inputs} → {outputs}",
                *(f"{t[name]:.3f}" for name in ("static", "token", "quantizing")),
                *(f"{t[name]:.3f}" for name in ("cublas", "bfloat16")),
                f"{t['bfloat16'] / t['static']:.2f} ×",
                f"{share:.0%}",
            )
        )
    header = ("layer", "static, ms", "per token, ms", "of it quantizing, ms")
    header += ("torch._int_mm alone, ms", "bfloat16, ms", "static over bfloat16")
    header += ("product's share of the int8 peak",)
    return Table(f"Linear, 8-bit weights and activations, {TOKENS} tokens", header, tuple(rows))


def vector_table(backend: Backend) -> Table:
    """Time linear layers with 4-bit weights on one token."""
    rows = []
    for inputs, outputs in VECTORS:
        x = torch.randn(1, inputs).cuda().bfloat16()
        w = torch.randn(outputs, inputs).cuda()
        weight = quantized(w, W4)
        product, half_w = _product(backend, LINEAR, weight, None, x), w.bfloat16()
        t = milliseconds(
            {
                "packed": lambda f=product, x=x: f(x, None),
                "bfloat16": lambda x=x, w=half_w: F.linear(x, w),
            }
        )
        bandwidth = inputs * outputs / 2 / t["packed"] / 1e6
        rows.append(
            (
                f"{inputs} → {outputs}",
                f"{t['packed'] * 1e3:.1f}",
                f"{t['bfloat16'] * 1e3:.1f}",
                f"{t['bfloat16'] / t['packed']:.2f} ×",
                f"{bandwidth:.0f}",
            )
        )
    header = ("layer", "4-bit, µs", "bfloat16, µs", "4-bit over bfloat16", "weight read, GB/s")
    return Table("Linear, 4-bit weights in groups of 128, bfloat16, one token", header, tuple(rows))


def conv_table(backend: Backend, most: float) -> Table:
    """Time 8-bit convolutions on channels-last images, quantizing included."""
    rows = []
    for c in CONVS:
        x = torch.randn(IMAGES, c.channels, c.size, c.size).cuda()
        x = x.to(memory_format=torch.channels_last)
        w = torch.randn(c.outputs, c.channels, c.kernel, c.kernel).cuda()
        product = _product(backend, c.operation, quantized(w, W8), A8, x)
        half, half_w = x.bfloat16(), w.bfloat16().to(memory_format=torch.channels_last)
        t = milliseconds(
            {
                "int8": lambda f=product, x=x: f(x, None),
                "bfloat16": lambda c=c, x=half, w=half_w: F.conv2d(
                    x, w, None, c.operation.stride, c.operation.padding
                ),
            }
        )
        rows.append(
            (
                f"{c.kernel}×{c.kernel}, {c.channels} → {c.outputs}, /{c.stride}, {c.size}²",
                f"{t['int8']:.3f}",
                f"{t['bfloat16']:.3f}",
                f"{t['bfloat16'] / t['int8']:.2f} ×",
                f"{c.operations / (t['int8'] / 1e3) / most:.0%}",
            )
        )
    header = ("layer", "8-bit, ms", "bfloat16, ms", "8-bit over bfloat16", "share of the int8 peak")
    return Table(f"Convolution, 8-bit, batch {IMAGES}, with quantizing", header, tuple(rows))


def _product(
    backend: Backend,
    operation: Operation,
    weight: QuantizedWeight,
    activation: ActivationScheme | None,
    x: Tensor,
) -> Callable[[Tensor, Tensor | None], Tensor | None]:
    """Return the product; raise where the backend would leave this call to the reference."""
    product = backend.prepare(operation, weight, activation, x.device)
    if product is None or product(x, None) is None:
        raise RuntimeError(f"{backend.name} does not compute {operation} on {tuple(x.shape)}")
    return product


def gpu_tables() -> list[Table]:
    """Time everything on the current GPU; raise where the backend cannot compute there."""
    from autoquant.kernels.gpu import BACKEND

    device = torch.device("cuda", torch.cuda.current_device())
    missing = BACKEND.missing(device)
    if missing is not None:
        raise SystemExit(missing)
    most = peak()
    row = (f"{PEAK}³", f"{most / 1e12:.0f}")
    peak_table = Table("int8 peak, torch._int_mm", ("product", "TOPS"), (row,))
    return [
        peak_table,
        linear_table(BACKEND, most),
        vector_table(BACKEND),
        conv_table(BACKEND, most),
    ]


def cpu_tables() -> list[Table]:
    """Time the CPU backend against float32 on this processor; raise where it can't compute."""
    from autoquant.kernels.cpu.backend import CpuBackend

    backend = CpuBackend()
    missing = backend.missing(torch.device("cpu"))
    if missing is not None:
        raise SystemExit(missing)
    with torch.no_grad():
        rows = [_cpu_linear(backend, *shape) for shape in CPU_LINEARS]
        rows += [_cpu_conv(backend, conv) for conv in CONVS]
    header = ("layer", "8-bit, ms", "float32, ms", "8-bit over float32", "8-bit, G products/s")
    return [Table("8-bit products on the CPU, with quantizing", header, tuple(rows))]


def _cpu_linear(backend: Backend, m: int, k: int, n: int) -> tuple[str, ...]:
    x, w = torch.randn(m, k), torch.randn(n, k)
    product = _product(backend, LINEAR, quantized(w, WEIGHT), _static(x), x)
    return _cpu_row(
        f"linear {m} × {k} → {n}", m * k * n, lambda: product(x, None), lambda: F.linear(x, w)
    )


def _cpu_conv(backend: Backend, c: Conv) -> tuple[str, ...]:
    last = torch.channels_last
    x = torch.randn(CPU_IMAGES, c.channels, c.size, c.size).contiguous(memory_format=last)
    w = torch.randn(c.outputs, c.channels, c.kernel, c.kernel)
    product = _product(backend, c.operation, quantized(w, WEIGHT), _static(x), x)
    wide = w.contiguous(memory_format=last)
    return _cpu_row(
        f"conv {c.kernel}×{c.kernel} / {c.stride}, {c.channels} → {c.outputs}, {c.size}²",
        c.operations * CPU_IMAGES // IMAGES // 2,
        lambda: product(x, None),
        lambda: F.conv2d(x, wide, None, c.stride, c.kernel // 2),
    )


def _static(x: Tensor) -> ActivationScheme:
    p = choose_qparams(x.min(), x.max(), 8, symmetric=False)
    return ActivationScheme(8, scale=p.scale.item(), zero_point=int(p.zero_point.item()))


def _cpu_row(
    title: str, products: int, eight: Callable[[], object], wide: Callable[[], object]
) -> tuple[str, ...]:
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(CPU_ROUNDS + 1):
        for call, seen in zip((eight, wide), times, strict=True):
            start = time.perf_counter()
            call()
            if i:  # the first is a warm-up
                seen.append(1e3 * (time.perf_counter() - start))
    fast, slow = map(statistics.median, times)
    speed = products / fast / 1e6
    return title, f"{fast:.2f}", f"{slow:.2f}", f"{slow / fast:.2f} ×", f"{speed:.0f}"


def main() -> None:
    """Measure, print, and write the report."""
    cuda = torch.cuda.is_available()
    tables = gpu_tables() if cuda else cpu_tables()
    machine = describe_machine()
    if cuda:
        machine = f"{torch.cuda.get_device_name()}. {machine}"
    text = "\n".join(["# Kernels", "", "`python -m tests.benchmarks.kernels`", ""])
    text += "\n" + "\n".join(t.markdown() for t in tables) + f"\n{machine}\n"
    print(text)
    REPORT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
