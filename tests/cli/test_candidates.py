"""Candidates that fail: what the user is told of them, and that the study is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FORWARD = """

def forward(model, inputs):
    outputs = model(inputs)
    if {condition}:
        {act}
    return outputs
"""
NARROW = "model[2].weight[0].unique().numel() <= 16"  # of 24 weights a channel: 4 bits or fewer
QUANTIZED = "any(m.weight.unique().numel() < m.weight.numel() for m in model[::2])"


def change(project: Path, condition: str, act: str) -> None:
    """Make the task act on some candidates."""
    with (project / "task.py").open("a") as file:
        file.write(FORWARD.format(condition=condition, act=act))


def trials(cli) -> list[dict]:
    return json.loads(cli("show", "--json").out)["trials"]


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("raise ValueError('too\\ncoarse')", "forward failed: ValueError: too coarse ("),
        ("raise MemoryError", "out of memory"),
        ("outputs = outputs * float('nan')", "outputs contain NaN"),
    ],
)
def test_some_fail(project, cli, act, reason):
    change(project, NARROW, act)
    result = cli("search", "model.pt", "--task", "task.py", "--trials", 14, "--json")
    assert result.done, result.err
    found = json.loads(result.out)
    rows = trials(cli)
    failed = [row for row in rows if row["reason"] is not None]
    reasons = {row["trial"]: row["reason"] for row in failed}
    assert 1 <= found["trials"]["failed"] < 14
    assert found["trials"]["failed"] == sum(row["tuned"] is None for row in failed)
    assert sum(found["trials"].values()) == 14
    told = [row for row in result.err.splitlines() if " failed: " in row]
    assert told == [f"trial {number} failed: {why}" for number, why in reasons.items()]
    shown = cli("show").out
    for number, why in reasons.items():
        assert why.startswith(reason)
        assert rows[number]["state"] == "fail"
        assert rows[number]["measured"] is None
        if "ValueError" in reason:
            assert f"({project / 'task.py'}:" in why
    assert f"fail: {reason}" in shown


def test_ten_in_a_row(project, cli):
    change(project, QUANTIZED, "raise ValueError('no')")
    # The preflight's recipe, 8 bits or the next width, is float here: the trials must find it out.
    (project / "space.yaml").write_text(
        "autoquant_space: 1\nrules:\n  - weight_bits: [16, 4, 3, 2]\n    activation_bits: [16, 8]\n"
    )
    words = ("--task", "task.py", "--space", "space.yaml", "--sampler", "random", "--trials", 300)
    result = cli("search", "model.pt", *words)
    assert (result.status, result.out) == (2, "")
    assert "Traceback" not in result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("error: 10 trials in a row failed, the last one: forward failed: ")
    assert "ValueError: no" in last
    rows = trials(cli)
    assert len(rows) < 300
    assert [row["state"] for row in rows[-10:]] == ["fail"] * 10
    assert not (project / "recipe.yaml").exists()
