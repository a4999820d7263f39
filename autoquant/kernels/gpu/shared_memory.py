"""How much shared memory a program of a kernel needs, as Triton lays it out."""

from __future__ import annotations

from autoquant.kernels.gpu.launch import Config

SPANS = 8
"""Spans of a packed chunk, which ``packed_matmul`` loads one after the other, all in flight."""
SPAN = 64
"""Most neighbouring inputs of a span."""
SLACK = 4096
"""Bytes for barriers and what else Triton keeps beside such operands, at most."""


def int8_bytes(c: Config) -> int:
    """Return the most bytes that a product of int8 tiles needs on any GPU.

    A stage of the pipeline holds a tile of each operand. Before Hopper one stage fewer is kept. The
    accumulator, 4 bytes a number, passes through the same memory on its way out.
    """
    m, n, k = (c.block(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return max(c.stages * (m + n) * k, 4 * m * n)


def packed_bytes(c: Config, bits: int, itemsize: int, capability: int) -> int:
    """Return the most bytes of a product of float tiles with packed weights of ``bits`` bits.

    Activations, ``itemsize`` bytes each, and packed weights are in flight a chunk at a time; one
    span of unpacked weights passes through. From 64 rows on Hopper multiplies 16 bits out of shared
    memory, which keeps a stage more, and Blackwell's large chips hold both operands of a span.
    """
    m, n, major = c.block("BLOCK_M"), c.block("BLOCK_N"), capability // 10
    in_flight = (c.stages - 1) * SPAN * (SPANS * m * itemsize + n * bits)
    activations = m * SPAN * itemsize
    weights = n * SPAN * itemsize
    if m >= 64 and major == 9 and itemsize == 2:
        return in_flight + SPANS * activations + weights + SLACK
    if m >= 64 and major in (10, 11):
        return in_flight + activations + 2 * weights + SLACK
    return max(in_flight, activations) + weights


def shared_bytes(c: Config, bits: int, itemsize: int, capability: int) -> int:
    """Return the bytes of ``c`` by the names of its blocks; 0 where tiles stay in registers.

    ``bits`` is 0 where the weights are not packed.
    """
    names = dict(c.blocks)
    if {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= names.keys():
        return int8_bytes(c)
    if bits and {"BLOCK_M", "BLOCK_N"} <= names.keys():
        return packed_bytes(c, bits, itemsize, capability)
    return 0
