"""Low-bit arithmetic: the same numbers as the reference, faster."""
