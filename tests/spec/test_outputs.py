"""Texts are written whole, known again, and never written over what is the user's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from autoquant.errors import UserError
from autoquant.spec.outputs import check_folder, check_target, is_signed, signed, write_text
from autoquant.spec.recipe import Recipe, SiteRecipe, WeightScheme
from autoquant.spec.recipe_file import load, save

RECIPE = Recipe({"größe ≤ 1": SiteRecipe(WeightScheme(4))})
OTHER = Recipe({"a": SiteRecipe(WeightScheme(8))})


def test_a_recipe_is_known_again_until_it_is_edited(tmp_path):
    path = tmp_path / "recipe.yaml"
    save(RECIPE, path)
    assert is_signed(path)
    assert load(path) == RECIPE
    save(OTHER, path)
    assert load(path) == OTHER


EDITS = {
    "a value": lambda t: t.replace("bits: 4", "bits: 5"),
    "a comment at the end": lambda t: t + "# mine\n",
    "a line before": lambda t: "# mine\n" + t,
    "the first line gone": lambda t: t.partition("\n")[2],
    "other line ends": lambda t: t.replace("\n", "\r\n"),
    "nothing left": lambda t: "",
    "something else": lambda t: "my notes\n",
}


@pytest.mark.parametrize("how", EDITS)
def test_what_was_edited_is_not_overwritten(tmp_path, how):
    path = tmp_path / "recipe.yaml"
    save(RECIPE, path)
    text = EDITS[how](path.read_bytes().decode()).encode()
    path.write_bytes(text)
    with pytest.raises(UserError, match="is there already and was edited, or not written by auto"):
        save(OTHER, path)
    assert path.read_bytes() == text
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_files_are_utf_8_whatever_the_locale_says(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    save(RECIPE, tmp_path / "r.yaml")
    assert "größe ≤ 1" in (tmp_path / "r.yaml").read_bytes().decode("utf-8")


def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path):
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", signed("a\n"))
    assert (tmp_path / "link").is_symlink()
    assert is_signed(tmp_path / "real")
    (tmp_path / "real").write_text("mine")
    with pytest.raises(UserError, match="not written by autoquant"):
        check_target(tmp_path / "link", is_signed)


def test_inputs_and_folders(tmp_path):
    path = tmp_path / "a"
    path.write_text(signed("a"))
    check_target(path, is_signed)
    check_target(tmp_path / "new", is_signed, {"model": path, "task": None, "gone": tmp_path / "g"})
    os.link(path, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(path)
    for other in (path, tmp_path / "hard", tmp_path / "soft", tmp_path / "x" / ".." / "a"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="is the model, which is read; write to another file"):
            check_target(other, is_signed, {"model": path})
    with pytest.raises(UserError, match="is a folder"):
        check_target(tmp_path / "x", is_signed)
    assert Path(path).read_text() == signed("a")


def test_check_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "deeper")
    check_folder(Path("relative"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is no folder"):
        check_folder(tmp_path / "file" / "below")
    monkeypatch.setattr("autoquant.spec.outputs.os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="is not writable"):
        check_folder(tmp_path)
