"""Ways out: what other tools can read."""
