"""How idle threads wait: said before torch is loaded, unless the user said it."""

import os

import pytest

from autoquant.cli import SPINS, set_waiting

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, (SPINS, "passive")),
        ({"OMP_WAIT_POLICY": "active"}, (None, "active")),
        ({"GOMP_SPINCOUNT": "7"}, ("7", "passive")),
        ({"GOMP_SPINCOUNT": "7", "OMP_WAIT_POLICY": "active"}, ("7", "active")),
    ],
)
def test_what_the_user_says_comes_first(monkeypatch, before, after):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that both are put back afterwards
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    set_waiting()
    assert tuple(os.environ.get(name) for name in NAMES) == after
