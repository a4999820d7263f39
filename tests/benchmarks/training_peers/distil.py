"""Training a peer's fake-quantized module: the same inputs, loss, schedule and checks for all.

Batches come in the order that autoquant's have with the same seed. As autoquant does, it looks at
held-back data ten times and keeps what was best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.training.objective import divergence
from autoquant.training.schedule import Lessons, rate_at
from autoquant.training.train import CHECKS

WARMUP = 0.05
"""As autoquant's."""


@dataclass(frozen=True)
class Trainee:
    """A module with a tool's fake quantizers; ``switch`` puts it into training mode, or out."""

    module: nn.Module
    switch: Callable[[bool], Any]


@dataclass(frozen=True)
class Course:
    """How it is trained: AdamW at ``rate``, up for a twentieth of the steps, down by a cosine."""

    steps: int
    batch: int
    rate: float
    seed: int


def held_loss(run: Callable[[Any], Tensor], pairs: Sequence[tuple[Any, Tensor]]) -> float:
    """Return the mean KL(teacher ‖ run) over samples, in ``pairs`` (inputs, its scores)."""
    total = count = 0.0
    with torch.no_grad():
        for inputs, wanted in pairs:
            total += float(divergence(run(inputs), wanted)) * len(inputs)
            count += len(inputs)
    return total / count


def distil(
    trainee: Trainee, teacher: nn.Module, lessons: Lessons, held: Sequence[Any], course: Course
) -> float:
    """Train in place; return the least loss on ``held``, inputs that it doesn't learn from.

    The module is left as it was then, in evaluation mode.
    """
    module = trainee.module
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    order = lessons.order(course.batch, course.seed)
    every = max(1, course.steps // CHECKS)
    torch.manual_seed(course.seed)
    with torch.no_grad():
        pairs = [(inputs, teacher(inputs)) for inputs in held]
    trainee.switch(False)
    best, kept = held_loss(module, pairs), _state(module)
    trainee.switch(True)
    for step in range(course.steps):
        for group in optimizer.param_groups:
            share = rate_at(step, course.steps, round(WARMUP * course.steps))
            group["lr"] = course.rate * share
        inputs = lessons.at(order.places(step))
        with torch.no_grad():
            wanted = teacher(inputs)
        loss = divergence(module(inputs), wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == course.steps:
            trainee.switch(False)
            now = held_loss(module, pairs)
            if now < best:
                best, kept = now, _state(module)
            trainee.switch(True)
    trainee.switch(False)
    with torch.no_grad():
        for tensor, own in zip(_tensors(module), kept, strict=True):
            tensor.copy_(own)
    return best


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _state(module: nn.Module) -> list[Tensor]:
    """Return copies of all that an evaluation depends on: running statistics too."""
    return [tensor.detach().clone() for tensor in _tensors(module)]
