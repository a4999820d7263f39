"""Repair and learning: what improves a quantized layer after calibration."""
