"""Statistics of tensors, and the calibration methods that turn them into ranges."""
