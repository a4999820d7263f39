"""Studies of these tests go to a folder of their own."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
