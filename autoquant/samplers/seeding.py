"""Seeds of trials and of workers.

Each trial's randomness is a function of the study's seed and the trial's number, so that a resumed
study gives the trials that an uninterrupted one gives.
"""

from __future__ import annotations


def of_worker(seed: int, worker: int) -> int:
    """Return the seed of one of several workers on a study: the study's own for the first."""
    return seed if not worker else derive(seed, 10**6 + worker)


def derive(seed: int, number: int) -> int:
    """Return the seed of one trial."""
    return (seed * 1_000_003 + number * 7919 + 1) % (2**32 - 1)
