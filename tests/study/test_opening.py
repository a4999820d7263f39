"""What a study is checked for before its first trial, and how it is named."""

import pytest

from autoquant.study.ledger import Ledger
from autoquant.study.opening import new_name


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("net", "net"),
        ("net.v2", "net.v2"),
        ("my net (1)", "my-net--1"),
        ("größe", "gr--e"),
        ("...", "study"),
        ("_x_", "x"),
        ("x" * 200, "x" * 80),
    ],
)
def test_new_name(model, name):
    assert new_name(model, None) == name
    Ledger.check_free(name, None)
