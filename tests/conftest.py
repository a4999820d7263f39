"""What every test needs before torch is loaded."""

import os

import pytest

# As the command line does: idle threads that spin slow down everything else on the machine.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
