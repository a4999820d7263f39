"""Weights that go back and forth are told from those that go somewhere."""

from __future__ import annotations

import torch

from autoquant.training.oscillation import MOMENTUM, Oscillation


def by_hand(path: list[int]) -> list[float]:
    """Return f after each step, as the paper's equations have it, number by number."""
    last, direction, f, found = path[0], 0, 0.0, []
    for now in path[1:]:
        change = (now > last) - (now < last)
        turned = change != 0 and change == -direction
        f = MOMENTUM * turned + (1 - MOMENTUM) * f
        if change:
            direction = change
        last = now
        found.append(f)
    return found


def test_frequencies_are_those_of_the_equations() -> None:
    draw = torch.Generator().manual_seed(0)
    paths = torch.randint(-2, 3, (60, 4, 5), generator=draw).float()
    seen = Oscillation(paths[0])
    wanted = {(i, j): by_hand([int(p[i, j]) for p in paths]) for i in range(4) for j in range(5)}
    for step, now in enumerate(paths[1:]):
        seen.see(now, 1.0)
        for (i, j), row in wanted.items():
            assert abs(float(seen.frequency[i, j]) - row[step]) < 1e-6
    assert not bool(seen.frozen.any())  # a threshold of 1 freezes none


def test_what_turns_back_is_frozen_at_what_it_is_most() -> None:
    seen = Oscillation(torch.zeros(1, 3))
    for step in range(200):
        # One that is at 1 in two of three steps, one that wanders off, one that stays.
        now = torch.tensor([[float(step % 3 > 0), float(step // 50), 0.0]])
        seen.see(now, 0.1)
    assert seen.frozen.tolist() == [[True, False, False]]
    assert seen.held().tolist()[0][0] == 1.0


def test_it_goes_on_where_it_was() -> None:
    draw = torch.Generator().manual_seed(0)
    paths = torch.randint(-2, 3, (40, 2, 3), generator=draw).float()
    whole, part = Oscillation(paths[0]), Oscillation(paths[0])
    for now in paths[1:20]:
        whole.see(now, 0.05)
        part.see(now, 0.05)
    again = Oscillation(torch.zeros(2, 3))
    again.load({k: v.clone() for k, v in part.state().items()})
    for now in paths[20:]:
        whole.see(now, 0.05)
        again.see(now, 0.05)
    assert all(torch.equal(v, again.state()[k]) for k, v in whole.state().items())
