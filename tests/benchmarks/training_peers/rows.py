"""One run of one tool, as it is kept in a line of the file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

STEPS, TIME = "steps", "time"
"""What is the same for all: the number of steps, or the seconds of the processor."""

Key = tuple[str, str, str, float, int]


@dataclass(frozen=True)
class Row:
    """What one run gave; ``error`` says why there is nothing.

    ``held`` is the loss on the search split, by which a learning rate is chosen; ``kl``, ``metric``
    and the drop are of the confirm split. ``prepared`` are the seconds of the processor before the
    first step, which are part of ``seconds``. Levels are the most of any layer.
    """

    case: str
    tool: str
    goal: str
    rate: float
    seed: int
    steps: int = 0
    batch: int = 0
    held: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    metric: float | None = None
    float_metric: float | None = None
    drop_low: float | None = None
    drop_high: float | None = None
    prepared: float | None = None
    seconds: float | None = None
    weight_levels: int | None = None
    activation_levels: int | None = None
    layers: int | None = None
    machine: str = ""
    version: str = ""
    commit: str = ""
    error: str | None = None

    @property
    def key(self) -> Key:
        """What tells one run from another."""
        return self.case, self.tool, self.goal, self.rate, self.seed

    @property
    def step_seconds(self) -> float | None:
        """Seconds of the processor that a step takes."""
        if self.seconds is None or self.prepared is None or not self.steps:
            return None
        return (self.seconds - self.prepared) / self.steps

    @classmethod
    def read(cls, plain: dict[str, Any]) -> Row:
        """Return the row that a line of the file holds."""
        known = {field.name for field in fields(cls)}
        return cls(**{k: v for k, v in plain.items() if k in known})

    def plain(self) -> dict[str, Any]:
        """Return what a line of the file keeps."""
        return asdict(self)
