"""A study that nobody gave a name takes one that is free by then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autoquant.errors import UserError
from autoquant.optimize import run
from autoquant.study.ledger import Ledger
from tests.optimize.test_run import net, task_of


@pytest.mark.parametrize("look", [1, 2])
def test_a_name_that_another_process_takes_is_not_insisted_on(
    look: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    looks = []
    before = run.new_name

    def overtaken(*words: Any) -> str:
        name = before(*words)
        looks.append(name)
        if len(looks) == look:
            Ledger.create(name, words[1], {})  # another process, between the look and what follows
        return name

    monkeypatch.setattr(run, "new_name", overtaken)
    found = run.search(net(), task_of(), trials=2)
    assert found.study == f"{looks[0]}-2"


def test_a_name_that_was_asked_for_is_refused_where_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Ledger.create("mine", None, {})
    with pytest.raises(UserError, match="mine exists already"):
        run.search(net(), task_of(), trials=2, study="mine")
