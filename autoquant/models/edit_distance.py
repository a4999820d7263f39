"""Edit distance between sequences, and the error rate of a prediction against its references."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Sequence


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Return the fewest insertions, deletions and substitutions that turn ``a`` into ``b``.

    Levenshtein 1966, by the row recurrence of Wagner and Fischer 1974: O(len(a) · len(b)) time.
    """
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        left = i
        for j, y in enumerate(b, 1):
            above = row[j]
            # Equal items cost nothing, and then no other path is shorter.
            if x == y:
                left = diagonal
            else:
                left = 1 + (
                    diagonal if diagonal <= above and diagonal <= left else min(above, left)
                )
            diagonal, row[j] = above, left
    return row[-1]


def nearest(
    prediction: Sequence[Hashable], references: Iterable[Sequence[Hashable]]
) -> tuple[int, int]:
    """Return (distance, length) of the reference nearest to ``prediction``, the first in a tie."""
    said = tuple(prediction)
    pairs = [(_distance(said, tuple(reference)), len(reference)) for reference in references]
    return min(pairs, key=lambda pair: pair[0])


@functools.lru_cache(maxsize=1 << 16)
def _distance(a: tuple[Hashable, ...], b: tuple[Hashable, ...]) -> int:
    """Return the edit distance; candidates say the same of most samples as those before them."""
    return edit_distance(a, b)
