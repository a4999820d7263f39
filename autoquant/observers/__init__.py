"""Statistics of tensors, and the calibration methods that turn them into ranges."""

from autoquant.observers.calibration import (
    CALIBRATIONS,
    activation_range,
    calibration_names,
    is_calibration,
)
from autoquant.observers.distortion import quantization_error, token_error
from autoquant.observers.statistics import StatisticsCollector, TensorStatistics
from autoquant.observers.weights import weight_range

__all__ = [
    "CALIBRATIONS",
    "StatisticsCollector",
    "TensorStatistics",
    "activation_range",
    "calibration_names",
    "is_calibration",
    "quantization_error",
    "token_error",
    "weight_range",
]
