"""Weights that go back and forth between two integers, and how they are frozen.

The straight-through gradient of a weight between two integers, of which neither is right, pushes it
over the edge and back for ever; what it is at the end is chance. f is the running mean of how often
its integer turns back: o = [it changed, and the other way than the last time], f ← m·o + (1 − m)·f.
A weight with f above a threshold is held from there on at the integer it was at most.
Source: Nagel et al. 2022, arXiv 2203.11086, equations 4 and 5 and section 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOMENTUM = 0.01
"""m, the share of the newest step in the running means."""


class Oscillation:
    """How often each weight of one site turns back; all tensors are [blocks, n]."""

    def __init__(self, integers: Tensor) -> None:
        self._last = integers.to(torch.int8)
        self._direction = torch.zeros_like(self._last)
        self.frequency = torch.zeros_like(integers)
        self.mean = integers.clone()
        self.frozen = torch.zeros_like(integers, dtype=torch.bool)

    def see(self, integers: Tensor, threshold: float) -> None:
        """Note the integers of one more step, and freeze what turns back too often."""
        now = integers.to(torch.int8)
        change = (now - self._last).sign()
        moved = change != 0
        turned = moved & (change == -self._direction)
        self.frequency.mul_(1 - MOMENTUM).add_(turned, alpha=MOMENTUM)
        self.mean.lerp_(integers, MOMENTUM)
        self._direction = torch.where(moved, change, self._direction)
        self._last = now
        if threshold < 1.0:
            self.frozen |= self.frequency > threshold

    def held(self) -> Tensor:
        """Return the integers that frozen weights are held at."""
        return self.mean.round()

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {
            "last": self._last,
            "direction": self._direction,
            "frequency": self.frequency,
            "mean": self.mean,
            "frozen": self.frozen,
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what ``state`` kept."""
        self._last, self._direction = state["last"], state["direction"]
        self.frequency, self.mean, self.frozen = state["frequency"], state["mean"], state["frozen"]
