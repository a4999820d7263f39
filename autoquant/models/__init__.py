"""Model files, task files, data and metrics, loaded safely."""
