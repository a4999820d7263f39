"""The study: samplers, trials, confirmation."""
