"""The script goes on where a part fails, and says so; a real GPU is another matter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run.sh")


def run(*words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(
        [str(SCRIPT), "--device", "cpu", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def results(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return the table at the end: each part, and what came of it."""
    lines = done.stdout.split("part  ")[1].splitlines()[1:]
    return dict(line.split(maxsplit=1) for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_a_part_that_fails_does_not_end_the_others(tmp_path):
    done = run("--only", "demo", "--only", "kernels", "--logs", tmp_path / "logs", tmp_path / "no")
    assert done.returncode == 1
    table = results(done)
    assert table["demo"].startswith("FAILED: status 1")
    assert table["kernels"].startswith("ok")
    assert "passed" in table["kernels"]
    assert "demo: not in" in (tmp_path / "logs" / "demo.log").read_text()


@pytest.mark.slow
def test_what_a_gpu_is_measured_by_runs_without_one(tmp_path):
    words = [sys.executable, "-m", "autoquant", "demo", str(tmp_path / "demo"), "--device", "cpu"]
    subprocess.run(words, check=True, capture_output=True)
    (tmp_path / "wheels").mkdir()
    done = run("--only", "rank", "--only", "evaluation", tmp_path)
    assert done.returncode == 0, done.stdout
    table = results(done)
    assert list(table)[:2] == ["rank", "evaluation"]
    assert "30 random recipes, Spearman" in table["rank"]
    assert "No measurement" in table["evaluation"]


def test_what_has_no_time_left_is_said_to_have_not_run(tmp_path):
    done = run("--only", "speed", "--seconds", 1, tmp_path)
    assert done.returncode == 1
    assert "NOT RUN" in done.stdout


def test_an_unknown_option():
    done = run("--gpu")
    assert done.returncode == 2
    assert done.stderr == "unknown option --gpu\n"
