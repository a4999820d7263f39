"""From trials to the one recipe that is returned, on data that no trial saw."""
