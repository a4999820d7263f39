"""Forms of convolutions, and which of them oneDNN may be asked for at all.

A convolution that is wrong in oneDNN may write beyond its buffers, which no comparison of numbers
shows. So what is known to do that is refused by rule, and everything else is compared with the
reference before it is used (``verification``).
"""

from __future__ import annotations

from dataclasses import dataclass

from autoquant.kernels.operation import Operation


@dataclass(frozen=True, slots=True)
class Geometry:
    """All that decides which code of oneDNN computes a convolution, and where it may go wrong.

    ``weight`` is [out, in / groups, *kernel], ``x`` [batch, in, *spatial]. Whether the activation
    has a zero point, how many threads share the work, and whether AMX may be used, choose too.
    """

    operation: Operation
    weight: tuple[int, ...]
    x: tuple[int, ...]
    zero_point: bool
    threads: int
    amx: bool


def may_be_tried(g: Geometry) -> bool:
    """Return whether a convolution may be tried: false for those known to read or write astray.

    With AMX, kernels whose rows or planes are dilated write beyond a block of oneDNN's own, and
    the process dies later, somewhere else: 53 of 18,000 random ones, found with an allocator that
    ends every block at a page that can't be written; none of 34,000 others, nor any without AMX.

    There must be an output, and each of its numbers must see at least one that is not padding:
    where one sees none, oneDNN reads beyond the input, and the process may die. Of groups with one
    channel, only the plain depthwise kind is right: the others take wrong zero points at some
    sizes. So does an input of one channel where the output is one number wide. All was found by
    trying shapes at random, with torch 2.13.
    """
    o, weight, spatial = g.operation, g.weight, g.x[2:]
    if g.x[0] < 1 or g.x[1] != weight[1] * o.groups or min(*weight, *g.x) < 1:
        return False
    depthwise = weight[0] == o.groups > 1
    single = weight[1] == 1 and not depthwise
    if single and (o.groups > 1 or len(spatial) > 2):
        return False
    rows = zip(weight[2:-1], o.dilation[:-1], strict=True)
    if g.amx and any(kernel > 1 and dilation > 1 for kernel, dilation in rows):
        return False
    width = 0
    for n, kernel, stride, padding, dilation in zip(
        spatial, weight[2:], o.stride, o.padding, o.dilation, strict=True
    ):
        room = n + 2 * padding - dilation * (kernel - 1) - 1
        if room < 0:
            return False
        for start in range(-padding, room - padding + 1, stride):
            if not any(0 <= start + k * dilation < n for k in range(kernel)):
                return False
        width = room // stride + 1
    return not single or width > 1
