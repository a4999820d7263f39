"""--rest on the command line: what a study begins with stays, and is said."""

from __future__ import annotations

import json


def test_a_search_says_its_rest_and_goes_on_with_it(project, cli):
    words = ("--task", "task.py", "--study", "s", "--trials", 6, "--rest", "bf16")
    begun = cli("search", "model.pt", *words)
    assert begun.done
    assert "note: what stays in float is computed in bf16" in begun.err
    assert "recipe, the rest in bf16" in begun.out
    found = json.loads(cli("resume", "s", "--trials", 9, "--json").out)
    assert found["rest"] == "bf16"
    assert "\nrest: bf16\n" in (project / "recipe.yaml").read_text()
    assert "recipe, the rest in bf16" in cli("show", "s").out
    words = ("model.pt", "--task", "task.py", "--recipe", "recipe.yaml")
    said = json.loads(cli("evaluate", *words, "--json").out)
    assert said["rest"] == "bf16"
    assert said["splits"]["confirm"]["quantized"] == found["metric"]["quantized"]
    assert cli("evaluate", *words).out.rstrip().endswith(", the rest in bf16")


def test_without_it_the_rest_is_float32(project, cli):
    words = ("--task", "task.py", "--study", "s", "--trials", 6)
    found = json.loads(cli("search", "model.pt", *words, "--json").out)
    assert found["rest"] == "float32"
    assert "rest:" not in (project / "recipe.yaml").read_text()


def test_a_study_whose_rest_this_release_does_not_know_is_refused(project, cli):
    words = ("--task", "task.py", "--study", "s", "--trials", 3)
    assert cli("search", "model.pt", *words).done
    journal = project / ".autoquant" / "s.journal"
    changed = journal.read_text().replace('"rest":"float32"', '"rest":"fp8"')
    assert changed != journal.read_text()
    journal.write_text(changed)
    refused = cli("resume", "s", "--trials", 4)
    assert refused.status == 2
    assert refused.err.strip().splitlines() == ["error: --rest 'fp8': give float32 or bf16"]
