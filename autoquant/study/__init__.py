"""A study as it is kept: what it began with, its trials, and what can be read from it later."""
