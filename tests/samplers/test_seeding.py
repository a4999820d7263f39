"""Seeds of trials."""

from __future__ import annotations

from autoquant.samplers.seeding import derive, of_worker


def test_seeds_differ_from_trial_to_trial():
    seeds = {derive(seed, number) for seed in range(30) for number in range(300)}
    assert len(seeds) == 30 * 300
    assert all(0 <= s < 2**32 for s in seeds)
    assert 0 <= derive(2**32 - 1, 10**6) < 2**32


def test_each_worker_has_a_seed_of_its_own_and_the_first_the_studys():
    assert of_worker(7, 0) == 7
    assert len({of_worker(7, worker) for worker in range(1000)}) == 1000
