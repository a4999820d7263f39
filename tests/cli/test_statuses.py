"""The exit status says whether the maximum drop is kept, so that a search can gate a build."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import autoquant
from autoquant.cli.failures import STATUSES
from autoquant.models.task import load_task
from autoquant.spec.verdict import FAIL, NOT_PROVEN, PASS

COARSE = """
autoquant_space: 1
rules:
  - weight_bits: [2]
    weight_granularity: [per_tensor]
    weight_calibration: [max]
"""
CASES = {
    PASS: ("--max-drop", "50%"),
    NOT_PROVEN: ("--max-drop", "1%"),
    FAIL: ("--max-drop", "0.1%", "--space", "coarse.yaml", "--tune", "none"),
}


@pytest.mark.parametrize("outcome", CASES)
def test_of_a_search_its_resumption_and_an_evaluation(project, cli, outcome):
    (project / "coarse.yaml").write_text(COARSE)
    words = ("model.pt", "--task", "task.py")
    asked = CASES[outcome]
    found = cli("search", *words, *asked, "--trials", 4, "--study", "s", "--json")
    assert json.loads(found.out)["verdict"]["outcome"] == outcome
    assert found.status == STATUSES[outcome]
    assert cli("resume", "s").status == STATUSES[outcome]
    drop = asked[:2]
    again = cli("evaluate", *words, "--recipe", "recipe.yaml", *drop)
    assert outcome in again.out
    assert again.status == STATUSES[outcome]
    # Nobody asked here.
    assert cli("evaluate", *words, "--recipe", "recipe.yaml").status == 0
    result = autoquant.search(
        "model.pt",
        load_task(project / "task.py"),
        max_drop=asked[1],
        space="coarse.yaml" if len(asked) > 2 else "default",
        trials=4,
        tune="none" if len(asked) > 2 else "auto",
        study="t",
    )
    assert result.verdict.outcome == outcome


def test_a_budget_alone_asks_for_no_maximum_drop(project, cli):
    words = ("search", "model.pt", "--task", "task.py", "--trials", 4, "--bits", 8)
    found = cli(*words, "--study", "a", "--json")
    assert json.loads(found.out)["verdict"]["outcome"] == NOT_PROVEN
    assert found.status == 0
    assert cli(*words, "--study", "b", "--max-drop", "1%").status == STATUSES[NOT_PROVEN]
    assert autoquant.search("model.pt", "task.py", bits=8, trials=4, study="c").verdict is None


def test_they_are_told_apart_and_documented(cli):
    assert STATUSES == {PASS: 0, FAIL: 3, NOT_PROVEN: 4}
    for command in ("search", "evaluate", "resume"):
        assert "3 FAIL, 4 NOT PROVEN" in " ".join(cli(command, "--help").out.split())


@pytest.mark.parametrize("words", [["--help"], ["studies"], ["search", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_where_nobody_reads_the_output_nothing_is_said(tmp_path, words, unbuffered):
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "autoquant", *words],
            cwd=tmp_path,
            stdout=write,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            text=True,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
