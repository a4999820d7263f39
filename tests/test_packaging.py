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


DATA = """
from setuptools import Distribution

distribution = Distribution()
distribution.parse_config_files()
distribution.include_package_data = False  # what lies there by chance does not count
command = distribution.get_command_obj("build_py")
command.ensure_finalized()
for _, source, _, names in command.data_files:
    for name in names:
        print(f"{source}/{name}")
"""


def test_data_are_in_the_wheel():
    """What is read at run time is copied beside the code; a source distribution takes it along."""
    root = Path(autoquant.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", DATA], cwd=root, check=True, capture_output=True, text=True
    )
    copied = {line.replace("\\", "/") for line in done.stdout.splitlines()}
    there = {
        path.relative_to(root).as_posix()
        for folder in ("autoquant", "search_spaces")
        for pattern in ("*.json", "*.yaml")
        for path in (root / folder).rglob(pattern)
    }
    assert "autoquant/kernels/gpu/configs.json" in there
    assert there <= copied


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
