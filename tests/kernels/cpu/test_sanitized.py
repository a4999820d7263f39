"""The tests of the C library pass on one that is watched by the compiler's sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from autoquant.kernels.cpu import library

ROOT = Path(__file__).parents[3]
SOURCES = [Path(library.__file__).with_name(name) for name in ("native.c", "products.c")]
TESTS = ("test_native.py", "test_library.py", "test_int16.py")
FLAGS = (
    *("-shared", "-fPIC", "-g", "-O1", "-std=c11", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
    *("-Wall", "-Wextra", "-Wconversion", "-Werror"),
)

DIRECT = """
import ctypes, torch
from tests.kernels.cpu.sanitized import LOADED
x, y = torch.ones(32768), torch.ones(32768)
lo, hi, n = {arguments}
print("before", flush=True)
LOADED.quantize(x.data_ptr(), y.data_ptr(), n, 1.0, lo, hi, 0)
"""


def runtime(compiler, name):
    """Return the path of one of the compiler's libraries, None where it isn't there."""
    asked = [compiler, f"-print-file-name={name}"]
    path = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return path if Path(path).is_absolute() and Path(path).exists() else None


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Return the environment of a process that runs on the watched library."""
    compiler = shutil.which("gcc")
    preloaded = compiler and runtime(compiler, "libasan.so")
    if not preloaded:
        pytest.skip("NOT RUN: the sanitizers need gcc with its libasan, and there is none here")
    built = tmp_path_factory.mktemp("sanitized") / "native.so"
    subprocess.run([compiler, *FLAGS, *map(str, SOURCES), "-o", str(built)], check=True)
    return os.environ | {
        "AUTOQUANT_SANITIZED": str(built),
        "LD_PRELOAD": preloaded,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has to the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }


def run(environment, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_tests_of_the_library_pass_under_sanitizers(watched):
    files = [str(Path(__file__).with_name(name)) for name in TESTS]
    done = run(
        watched,
        "-m",
        "pytest",
        "-s",
        "-rs",
        "-p",
        "tests.kernels.cpu.sanitized",
        "-p",
        "no:cacheprovider",
        *files,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "SKIPPED" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        # One beyond the end: farther out there may be no memory at all, and no word about whose.
        ("(-8.0, 7.0, 32769)", "heap-buffer-overflow"),
        ("(-8.0, 1e30, 32768)", ""),  # nothing is out of range yet: 1 stays 1
        ("(3e9, 4e9, 32768)", "outside the range"),
    ],
)
def test_sanitizers_see_what_they_should(watched, arguments, found):
    done = run(watched, "-c", DIRECT.format(arguments=arguments))
    assert "before" in done.stdout, done.stderr
    assert (done.returncode != 0) == bool(found), done.stderr
    assert found in done.stderr
