"""What is installed is what is there."""

import os
import subprocess
import sys
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


GROUPED = """
import os, pytest

@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("i", range(12))
def test_it(i):
    with open("workers", "a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + "\\n")
"""


def test_one_worker_runs_all_tests_of_a_group(tmp_path):
    """What they share is made once: pytest 9.2 and pytest-xdist 3.8 lost that in silence."""
    (tmp_path / "test_grouped.py").write_text(GROUPED, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = xdist_group\n", encoding="utf-8")
    words = ["-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    subprocess.run([sys.executable, *words], cwd=tmp_path, check=True, capture_output=True, env=own)
    workers = (tmp_path / "workers").read_text(encoding="utf-8").split()
    assert len(workers) == 12
    assert len(set(workers)) == 1
