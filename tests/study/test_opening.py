"""What a study is checked for before its first trial, and how it is named."""

from pathlib import Path

import pytest

from autoquant.errors import UserError
from autoquant.study.ledger import Ledger
from autoquant.study.opening import check_folder, new_name


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


def test_check_folder(tmp_path, monkeypatch):
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "deeper")
    check_folder(Path("relative"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is no folder"):
        check_folder(tmp_path / "file" / "below")
    monkeypatch.setattr("autoquant.study.opening.os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="is not writable"):
        check_folder(tmp_path)
