"""What calibration can find out about the input of a layer."""

from __future__ import annotations

import enum


class Need(enum.Enum):
    """One thing that calibration can find out about the input of a layer."""

    RANGE = "the distribution of its input"
    MEANS = "the mean of its input"
    OUTPUT_ERROR = "what an error of its weight does to its output"
    CENTERED_OUTPUT_ERROR = "what an error of its weight does to its output about the mean"
    MOMENTS = "the second moments of its input"
