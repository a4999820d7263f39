"""Which layers of a large model are alike: repeated blocks whose profiles have one shape."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from autoquant.libraries import library
from autoquant.sensitivity.profile import Profile

FARTHEST = 1.5
"""Distance up to which profiles are alike: the root of the mean squared logarithm of ratios."""


def groups(names: Sequence[str], profile: Profile) -> list[list[int]]:
    """Return the sites that are alike, as indices into ``names``; each site is in one group.

    Those at the same place of repeated blocks (names that differ in numbers, as many weights)
    whose damages at all widths are near each other, by agglomerative clustering with average
    linkage.
    """
    places: dict[tuple[str, int, int], list[int]] = {}
    shapes = [_shape(profile, name) for name in names]
    for i, name in enumerate(names):
        key = re.sub(r"\d+", "#", name), profile.numel[name], len(shapes[i])
        places.setdefault(key, []).append(i)
    found: list[list[int]] = []
    for members in places.values():
        labels = _clusters(np.stack([shapes[i] for i in members]))
        clusters: dict[int, list[int]] = {}
        for i, label in zip(members, labels.tolist(), strict=True):
            clusters.setdefault(label, []).append(i)
        found += clusters.values()
    return found


def _shape(profile: Profile, name: str) -> np.ndarray:
    """Return the logarithm of the least damage at each width, narrow to wide."""
    least: dict[int, float] = {}
    for option in profile.options[name]:
        if option.recipe.weight is not None:
            least[option.bits] = min(option.damage, least.get(option.bits, np.inf))
    damages = np.array([least[bits] for bits in sorted(least)], dtype=float)
    return np.asarray(np.log(np.maximum(damages, 1e-30)))


def _clusters(shapes: np.ndarray) -> np.ndarray:
    """Return the label of each row of ``shapes`` [sites, widths]."""
    if len(shapes) < 2 or not shapes.shape[1]:
        return np.zeros(len(shapes), dtype=int)
    # Euclidean distance over widths: the root of their number makes it a mean.
    scaled = shapes / np.sqrt(shapes.shape[1])
    found = (
        library("sklearn.cluster")
        .AgglomerativeClustering(n_clusters=None, distance_threshold=FARTHEST, linkage="average")
        .fit(scaled)
    )
    return np.asarray(found.labels_)
