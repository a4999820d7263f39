"""How weights are brought to their grid: each file registers the technique of its name."""
