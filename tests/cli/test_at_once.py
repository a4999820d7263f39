"""Searches that begin at the same moment each get a study of their own, or are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def at_once(folder, *words: str, processes: int = 3) -> list[tuple[int, str, str]]:
    command = [sys.executable, "-m", "autoquant", "search", "model.pt", "--task", "task.py"]
    command += ["--trials", "3", "--json", *words]
    started = [
        subprocess.Popen(
            [*command, "--out", str(i)],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    found = []
    for process in started:
        out, err = process.communicate(timeout=120)
        found.append((process.returncode, out, err))
    return found


def count(cli, *words: str) -> int:
    """Return how many trials a study has, without those that were tuned after them."""
    rows = json.loads(cli("show", *words, "--json").out)["trials"]
    return sum(row["tuned"] is None for row in rows)


@pytest.mark.parametrize("storage", [(), ("--storage", "sqlite:///s.db?timeout=60")])
def test_under_one_name(project, cli, storage):
    ended = at_once(project, "--study", "s", *storage)
    assert sorted(status == 2 for status, _, _ in ended) == [False, True, True]
    for status, _, err in ended:
        assert "Traceback" not in err
        assert status in (0, 3, 4) or "study s exists already in " in err.splitlines()[-1]
    assert count(cli, "s", *storage) == 3


@pytest.mark.parametrize("storage", [(), ("--storage", "sqlite:///s.db")])
def test_under_no_name(project, cli, storage):
    ended = at_once(project, *storage)
    assert {status for status, _, _ in ended} <= {0, 3, 4}, ended
    names = {json.loads(out)["study"] for _, out, _ in ended}
    assert names == {"model", "model-2", "model-3"}
    for name in names:
        assert count(cli, name, *storage) == 3
