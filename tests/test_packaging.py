"""What is installed is what is there."""

import tomllib
from pathlib import Path

import autoquant


def test_every_package_is_in_the_wheel():
    """A folder that is not listed is there in an editable install, and nowhere else."""
    root = Path(autoquant.__file__).parents[1]
    with (root / "pyproject.toml").open("rb") as file:
        listed = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    there = {
        ".".join(path.parent.relative_to(root).parts)
        for path in (root / "autoquant").rglob("__init__.py")
    }
    assert listed - {"autoquant.search_spaces"} == there
