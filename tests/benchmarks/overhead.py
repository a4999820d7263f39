"""What a trial costs beside its evaluation: ``python -m tests.benchmarks.overhead``.

A study of 50 layers × 4 parameters whose candidates are "measured" by a formula, so that all of the
time is overhead: suggest, record durably, read back. The default sampler and Optuna's TPE through
autoquant's one write a trial, beside TPE as Optuna runs it, one write a parameter; all on a journal
file in the working directory, where a study's own is. Writes ``reports/overhead.md``.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from autoquant.optimize.loop import Outcome, Stop, run_trials
from autoquant.samplers.base import Context, Proposer
from autoquant.samplers.baselines import Baselines
from autoquant.samplers.knapsack.proposer import KnapsackProposer
from autoquant.samplers.knapsack.sampler import KnapsackSampler
from autoquant.samplers.registry import SAMPLERS
from autoquant.sensitivity.profile import Option, Profile
from autoquant.session.session import Session
from autoquant.spec.goal import Goal, Measurement
from autoquant.spec.options import Options
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.space import DEFAULTS, SiteSpace
from autoquant.spec.uniform import baselines
from autoquant.study.ledger import Ledger
from autoquant.study.parameters import ParameterMap
from tests.benchmarks.machine import describe_machine

LAYERS = 50
TRIALS = 100
"""Trials that are timed, after the uniform recipes that every study begins with."""
LATE = ((50, 500), (500, 2000))
"""Layers and trials of long studies, of which the last trials are timed."""
REPORT = Path(__file__).resolve().parents[2] / "reports" / "overhead.md"
CHOICES = {
    **DEFAULTS,
    "weight_bits": (8, 6, 4),
    "weight_calibration": ("mse", "max"),
    "activation_bits": (8, 16),
    "activation_calibration": ("mse", "max", "percentile_99.99"),
}


def made_up_profile(names: list[str]) -> Profile:
    """Return a profile in which two bits more quarter the noise twice."""
    weights = {
        WeightScheme(bits, calibration=c): 4.0**-bits
        for bits in CHOICES["weight_bits"]
        for c in CHOICES["weight_calibration"]
    }
    activations = {
        ActivationScheme(8, calibration=c): 1e-5 for c in CHOICES["activation_calibration"]
    }
    activation = ActivationScheme(8, calibration="mse")
    options = tuple(
        Option(SiteRecipe(WeightScheme(b, calibration="mse"), activation), 4.0**-b, b, 125 * b)
        for b in CHOICES["weight_bits"]
    )
    return Profile(
        dict.fromkeys(names, options),
        dict.fromkeys(names, weights),
        dict.fromkeys(names, activations),
        dict.fromkeys(names, 1000),
    )


def calibrated(site: SiteRecipe) -> SiteRecipe:
    """Return ``site`` with the numbers that a trial keeps of a static activation."""
    if site.activation is None:
        return site
    return replace(site, activation=replace(site.activation, scale=0.0123456789, zero_point=-3))


class Clock:
    """Notes the time between trials, by the clock ``now``."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.times: list[float] = []
        self.last = now()

    def trial(self, *_: object) -> None:
        """Note one trial."""
        now = self.now()
        self.times.append(now - self.last)
        self.last = now

    def step(self, *_: object) -> None:
        """Do nothing."""


def through_autoquant(
    name: str,
    make: Callable[[Ledger, ParameterMap, Profile, Goal], Proposer],
    layers: int = LAYERS,
    trials: int = TRIALS,
    now: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Run a study through the trial loop; return the seconds of each trial but the uniform ones.

    Seconds are those of the clock ``now``.
    """
    names = [f"layer{i}" for i in range(layers)]
    mapping = ParameterMap({n: SiteSpace(CHOICES) for n in names})
    assert len(mapping.distributions) == 4 * layers
    profile = made_up_profile(names)
    importance = np.random.default_rng(0).lognormal(0, 1, layers)
    goal = Goal(0.02, 4000 * layers)

    def measure(sites: dict[str, SiteRecipe], _: object) -> Outcome:
        noise = [profile.damage(n, sites[n]) for n in names]
        loss = float(importance @ noise)
        bits = sum(sites[n].weight_bits for n in names) / layers
        size = int(1000 * layers * bits / 8)
        done = {n: calibrated(site) for n, site in sites.items()}
        return Outcome(Measurement(0.9, 3 * loss, loss, bits, size, 0.0), done, False)

    plain = list(baselines(mapping.spaces))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        ledger = Ledger.create(name, f"{folder}/study.journal", {"made": "up"})
        proposer = Baselines(plain, mapping, make(ledger, mapping, profile, goal))
        stop = Stop(len(plain) + trials, None)
        clock = Clock(now)
        run_trials(ledger, mapping, proposer, goal, measure, stop, clock)
    return clock.times[len(plain) :]


def knapsack(ledger: Ledger, mapping: ParameterMap, profile: Profile, goal: Goal) -> Proposer:
    """Return the default sampler."""
    sampler = KnapsackSampler(mapping, profile, goal, 0, 0)
    return KnapsackProposer(sampler, ledger.trials)


def tpe(ledger: Ledger, mapping: ParameterMap, profile: Profile, goal: Goal) -> Proposer:
    """Return TPE through autoquant's one write a trial."""
    session = mock.create_autospec(Session)  # there is no model, and TPE asks for none
    return SAMPLERS.get("tpe")(Context(ledger, session, mapping, goal, Options()))


def plain_tpe() -> list[float]:
    """Run TPE as Optuna does: each suggestion is a write."""
    mapping = ParameterMap({f"layer{i}": SiteSpace(CHOICES) for i in range(LAYERS)})
    clock = Clock()

    def objective(trial: optuna.Trial) -> float:
        total = 0.0
        for name, d in mapping.distributions.items():
            if isinstance(d, optuna.distributions.CategoricalDistribution):
                total += len(str(trial.suggest_categorical(name, d.choices)))
            else:
                total += trial.suggest_int(name, d.low, d.high, step=d.step)
        return total

    with tempfile.TemporaryDirectory(dir=".") as folder:
        storage = JournalStorage(JournalFileBackend(f"{folder}/study.journal"))
        sampler = optuna.samplers.TPESampler(seed=0)
        study = optuna.create_study(storage=storage, sampler=sampler)
        study.optimize(objective, n_trials=TRIALS, callbacks=[clock.trial])
    return clock.times


def main() -> None:
    """Measure, print the table, write the report."""
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    rows = {
        "autoquant, default sampler": through_autoquant("knapsack", knapsack),
        "autoquant, TPE": through_autoquant("tpe", tpe),
        "Optuna, TPE, one write a parameter": plain_tpe(),
    }
    for layers, trials in LATE:
        seconds = through_autoquant(f"late{layers}", knapsack, layers, trials)
        rows[f"autoquant, default sampler, {layers} layers, the last {TRIALS} of"] = seconds
    lines = ["| | trials | median ms a trial | 95th percentile |", "|---|---|---|---|"]
    for name, seconds in rows.items():
        ms = 1000 * np.array(seconds[-TRIALS:])
        lines.append(
            f"| {name} | {len(seconds)} | {np.median(ms):.1f} | {np.percentile(ms, 95):.1f} |"
        )
    table = "\n".join(lines)
    REPORT.write_text(
        f"# Overhead of a trial\n\n`python -m tests.benchmarks.overhead`: {LAYERS} layers × 4 "
        "parameters; suggest, record durably (fsync), read back; no evaluation. Over "
        f"{TRIALS} trials, after the uniform recipes that every study begins with.\n\n{table}\n\n"
        f"{describe_machine()}\n",
        encoding="utf-8",
    )
    print(table)


if __name__ == "__main__":
    main()
