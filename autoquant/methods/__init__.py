"""Repair and learning: what improves a quantized layer after calibration, a file a technique."""
