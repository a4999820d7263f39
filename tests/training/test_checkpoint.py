"""Checkpoints: what was written is read, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from autoquant.errors import UserError
from autoquant.training.checkpoint import read_checkpoint, write_checkpoint

CPU = torch.device("cpu")


def state() -> dict[str, Any]:
    return {
        "tensors": {"a|weight": torch.randn(3, 4), "a||frozen": torch.tensor([True, False])},
        "done": 7,
        "losses": [0.1, float("inf")],
    }


def test_what_was_written_is_read(tmp_path: Path) -> None:
    written = state()
    write_checkpoint(tmp_path / "c", written, "one")
    found = read_checkpoint(tmp_path / "c", "one", CPU)
    assert found is not None
    tensors = found.pop("tensors")
    assert {k: v for k, v in written.items() if k != "tensors"} == found
    assert all(torch.equal(v, tensors[k]) for k, v in written["tensors"].items())


def test_one_of_something_else_is_not_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", state(), "one")
    assert read_checkpoint(tmp_path / "c", "two", CPU) is None
    assert read_checkpoint(tmp_path / "d", "one", CPU) is None


@pytest.mark.parametrize("cut", [0, 5, 100, -3])
def test_a_damaged_one_is_none(tmp_path: Path, cut: int) -> None:
    write_checkpoint(tmp_path / "c", state(), "one")
    content = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(content[:cut])
    assert read_checkpoint(tmp_path / "c", "one", CPU) is None


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError):
        write_checkpoint(tmp_path / "f" / "c", state(), "one")
