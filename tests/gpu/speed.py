"""The kernels against bfloat16, a few shapes in a minute: ``python -m tests.gpu.speed DEVICE``.

Linear layers of BERT-base on 32 × 128 tokens, convolutions of ResNet-50 and MobileNetV2 on 64
images. ``tests.benchmarks.kernels`` measures all shapes, and against other libraries.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from autoquant.kernels.operation import LINEAR, Backend, Operation
from tests.benchmarks import kernels as bench

GROUPED = ((144, 3, 1, 56), (384, 3, 1, 14))
"""Depthwise convolutions of MobileNetV2: channels, kernel, stride, size."""
CONVS = (
    bench.Conv(64, 64, 3, 1, 56),
    bench.Conv(64, 256, 1, 1, 56),
    bench.Conv(256, 256, 3, 1, 14),
    bench.Conv(24, 144, 1, 1, 56),
    bench.Conv(960, 160, 1, 1, 7),
)
Calls = dict[str, Callable[[], object]]


def linears(backend: Backend, device: torch.device, tokens: int) -> Iterator[tuple[str, Calls]]:
    """Yield the calls of each linear layer."""
    for inputs, outputs in bench.LINEARS:
        x = torch.randn(tokens, inputs, device=device)
        w = torch.randn(outputs, inputs, device=device)
        product = bench._product(backend, LINEAR, bench.quantized(w, bench.W8), bench.A8, x)
        half, half_w = x.bfloat16(), w.bfloat16()
        yield (
            f"linear {inputs} → {outputs}",
            {
                "8-bit": lambda f=product, x=x: f(x, None),
                "bfloat16": lambda x=half, w=half_w: F.linear(x, w),
            },
        )


def convolutions(
    backend: Backend, device: torch.device, images: int
) -> Iterator[tuple[str, Calls]]:
    """Yield the calls of each convolution."""
    for c in CONVS:
        name = f"conv {c.kernel}×{c.kernel}, {c.channels} → {c.outputs}, {c.size}²"
        sizes = c.channels, c.outputs, c.size
        yield _convolution(backend, device, images, name, c.operation, *sizes)
    for channels, kernel, stride, size in GROUPED:
        pad = kernel // 2
        operation = Operation("conv2d", (stride,) * 2, (pad, pad), (1, 1), channels)
        name = f"depthwise {kernel}×{kernel}, {channels}, {size}²"
        yield _convolution(backend, device, images, name, operation, channels, channels, size)


def _convolution(
    backend: Backend,
    device: torch.device,
    images: int,
    name: str,
    operation: Operation,
    channels: int,
    outputs: int,
    size: int,
) -> tuple[str, Calls]:
    last = torch.channels_last
    kernel = 2 * operation.padding[0] + 1
    x = torch.randn(images, channels, size, size, device=device).to(memory_format=last)
    w = torch.randn(outputs, channels // operation.groups, kernel, kernel, device=device)
    product = bench._product(backend, operation, bench.quantized(w, bench.W8), bench.A8, x)
    half, half_w = x.bfloat16(), w.bfloat16().to(memory_format=last)
    how = operation.stride, operation.padding, operation.dilation, operation.groups
    return name, {
        "8-bit": lambda: product(x, None),
        "bfloat16": lambda: F.conv2d(half, half_w, None, *how),
    }


def on_cpu(calls: Calls) -> dict[str, float]:
    """Return the milliseconds of one call of each: enough to try this file without a GPU."""
    found = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        found[name] = 1e3 * (time.perf_counter() - start)
    return found


def main(name: str) -> int:
    """Print a line for each shape; return the exit status."""
    device = torch.device(name)
    if device.type == "cuda":
        from autoquant.kernels.gpu import BACKEND

        backend: Backend = BACKEND
        measure, tokens, images = bench.milliseconds, bench.TOKENS, bench.IMAGES
    else:
        from autoquant.kernels.cpu.backend import CpuBackend

        backend, measure, tokens, images = CpuBackend(), on_cpu, 64, 1
    missing = backend.missing(device)
    if missing is not None:
        print(missing)
        return 1
    ratios = []
    for rows in (linears(backend, device, tokens), convolutions(backend, device, images)):
        for title, calls in rows:
            t = measure(calls)
            ratios.append(t["bfloat16"] / t["8-bit"])
            line = f"{t['8-bit']:8.3f} ms, bfloat16 {t['bfloat16']:8.3f} ms, {ratios[-1]:.2f} ×"
            print(f"{title:34}{line}", flush=True)
    print(f"8-bit over bfloat16: {min(ratios):.2f} × to {max(ratios):.2f} ×")
    return 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main(sys.argv[1]))
