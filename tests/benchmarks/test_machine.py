"""A report whose rows come from several machines says which are from which."""

from tests.benchmarks import machine
from tests.benchmarks.machine import machines

TITLES = ["A, b", "C", "D"]


def test_rows_of_another_machine_keep_its_name(monkeypatch):
    monkeypatch.setattr(machine, "describe_machine", lambda: "Measured on X; torch 2.")
    assert machines("", TITLES, TITLES) == "Measured on X; torch 2."
    old = "# T\n\nMeasured on Y; torch 1.\n\n| A, b | 1 |"
    both = machines(old, ["C"], TITLES)
    assert both.splitlines() == [
        "Measured on Y; torch 1. Rows of: A, b; D.",
        "Measured on X; torch 2. Rows of: C.",
    ]
    assert machines(both, ["A, b", "D"], TITLES) == "Measured on X; torch 2."
    again = machines(both, ["D"], TITLES)
    assert "Rows of: A, b." in again
    assert "Rows of: C; D." in again
