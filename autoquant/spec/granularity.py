"""Granularity: which numbers share one scale. Every kind reduces to one block size.

A weight is seen as a matrix [output channels, everything else]; an activation as
[tokens, features]. ``block_size`` of that matrix says all there is to say.
"""

from __future__ import annotations

import re

from autoquant.errors import SpecError

PER_TENSOR = "per_tensor"
PER_CHANNEL = "per_channel"
PER_TOKEN = "per_token"
GROUP_SIZES = (32, 64, 128)
WEIGHT_GRANULARITIES = (PER_TENSOR, PER_CHANNEL, *(f"per_group_{g}" for g in GROUP_SIZES))
ACTIVATION_GRANULARITIES = (PER_TENSOR, PER_TOKEN)

_GROUP = re.compile(r"per_group_([1-9][0-9]*)")


def group_size(granularity: str) -> int | None:
    """Return the group size of ``per_group_N``, or None for the other granularities."""
    match = _GROUP.fullmatch(granularity)
    return int(match[1]) if match else None


def block_size(granularity: str, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the block of a matrix of ``shape`` [rows, columns] that shares one scale.

    Raises SpecError where a group does not divide the columns.
    """
    rows, columns = shape
    if granularity == PER_TENSOR:
        return rows, columns
    if granularity in (PER_CHANNEL, PER_TOKEN):
        return 1, columns
    group = group_size(granularity)
    if group is None:
        raise SpecError(f"unknown granularity {granularity!r}")
    if columns % group:
        raise SpecError(f"{granularity} does not divide the {columns} inputs of a channel")
    return 1, group


def divides(granularity: str, shape: tuple[int, int]) -> bool:
    """Return whether blocks of ``granularity`` tile a matrix of ``shape``."""
    group = group_size(granularity)
    return group is None or shape[1] % group == 0
