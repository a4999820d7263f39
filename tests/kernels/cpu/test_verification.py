"""A convolution is used only after a child process has found it right, once per machine."""

import dataclasses
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch

from autoquant.kernels.cpu import onednn, trying, verification
from autoquant.kernels.cpu.geometry import Geometry
from autoquant.kernels.cpu.instructions import has_amx
from autoquant.kernels.cpu.verification import is_right, line_of
from autoquant.kernels.operation import Operation
from autoquant.spec.recipe import ActivationScheme, WeightScheme
from tests.kernels.cases import MOST_BITS, quantized

pytestmark = pytest.mark.skipif(
    onednn.missing(torch.device("cpu")) is not None, reason="no oneDNN here"
)
CONV = Operation("conv2d", (1, 1), (1, 1), (1, 1), 1)


def geometry(**changes):
    g = Geometry(CONV, (4, 3, 3, 3), (2, 3, 9, 9), True, 1, has_amx())
    return dataclasses.replace(g, **changes)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A machine where nothing is known, and no child runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = (verification.verdicts_path, verification._known, verification._verdicts)
    for function in cached:
        function.cache_clear()
    yield tmp_path
    verification._verdicts().close()
    for function in cached:
        function.cache_clear()


def child(monkeypatch, program):
    """Have another program stand in for the child; return how often it was started."""
    started = []

    def start():
        started.append(1)
        return subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    monkeypatch.setattr(verification, "_start", start)
    return started


def kept():
    path = verification.verdicts_path()
    return path.read_text().splitlines() if path.exists() else []


def test_a_verdict_is_kept_for_this_process_and_the_next(fresh, monkeypatch):
    assert is_right(geometry())
    assert is_right(geometry(threads=2))
    assert kept() == [f"right {line_of(geometry())}", f"right {line_of(geometry(threads=2))}"]
    child(monkeypatch, "raise SystemExit(1)")
    verification._verdicts().close()
    assert is_right(geometry())
    verification._known.cache_clear()
    assert is_right(geometry())


def test_a_geometry_is_written_and_read_as_it_is():
    for g in (geometry(), geometry(threads=7, zero_point=False, amx=True)):
        assert trying.geometry_of(line_of(g)) == g


def test_what_comes_out_wrong_is_refused_and_remembered(fresh, monkeypatch):
    started = child(
        monkeypatch, "print('ready', flush=True)\nfor _ in open(0): print('wrong', flush=True)"
    )
    assert not is_right(geometry())
    assert not is_right(geometry())
    assert not is_right(geometry(threads=3))
    assert len(started) == 1
    assert [line.split()[0] for line in kept()] == ["wrong", "wrong"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    ("death", "remembered"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", True),
        ("os.abort()", True),
        ("os.kill(os.getpid(), signal.SIGKILL)", False),  # the system was out of memory, say
        ("print('failed', flush=True); input()", False),
        ("os._exit(0)", False),  # it has ended for want of questions, twice
    ],
)
def test_a_child_that_dies_is_an_answer(fresh, monkeypatch, death, remembered):
    program = f"import os, signal; print('ready', flush=True); input(); {death}; os._exit(0)"
    started = child(monkeypatch, program)
    assert not is_right(geometry())
    assert not is_right(geometry())  # not asked again in this process
    assert len(kept()) == remembered
    child(monkeypatch, "print('ready', flush=True); input(); print('right', flush=True)")
    verification._verdicts().close()
    assert is_right(geometry(threads=3))  # the next has a child of its own
    assert len(started) == (2 if "_exit" in death else 1)


def test_a_child_that_ended_for_want_of_questions_is_started_anew(fresh, monkeypatch):
    program = "print('ready', flush=True); input(); print('right', flush=True)"
    started = child(monkeypatch, program)
    assert all(is_right(geometry(threads=n)) for n in (1, 2, 3))
    assert len(started) == 3
    code = f"import {trying.__name__} as t; t.IDLE_SECONDS = 0.1; t.main()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as idle:
        assert idle.wait(60) == 0
        assert idle.stdout.read() == b"ready\n"


def test_a_child_that_hangs_is_ended(fresh, monkeypatch):
    monkeypatch.setattr(verification, "SECONDS", 0.2)
    child(monkeypatch, "print('ready', flush=True); input(); input()")
    assert not is_right(geometry())
    assert kept() == []


def test_without_a_child_everything_is_refused_and_it_is_said_once(fresh, monkeypatch):
    started = child(monkeypatch, "raise SystemExit(3)")
    with pytest.warns(RuntimeWarning, match=r"can't be tried .*status 3.*computed in float"):
        assert not is_right(geometry())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not is_right(geometry(threads=2))
    assert len(started) == 1
    assert kept() == []
    product = onednn.prepare(
        CONV,
        quantized(torch.randn(4, 3, 3, 3), WeightScheme(MOST_BITS)),
        ActivationScheme(8, scale=0.1, zero_point=0),
    )
    assert product(torch.randn(2, 3, 9, 9), None) is None


def test_a_missing_python_is_said(fresh, monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    with pytest.warns(RuntimeWarning, match="no Python"):
        assert not is_right(geometry())


def test_damaged_files_and_folders_that_cannot_be_written_are_no_failure(fresh, monkeypatch):
    path = verification.verdicts_path()
    path.parent.mkdir(parents=True)
    good = line_of(geometry(threads=5))
    path.write_bytes(b"\xff\xfe\nright\nright {\nmaybe {}\n" + f"wrong {good}\n".encode())
    assert not is_right(geometry(threads=5))
    assert is_right(geometry())
    verification._known.cache_clear()
    path.unlink()
    path.mkdir()
    assert is_right(geometry(threads=2))


def test_verdicts_of_other_machines_settings_and_versions_are_others(fresh, monkeypatch):
    first = verification.verdicts_path()
    for change in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        verification.verdicts_path.cache_clear()
        with monkeypatch.context() as patch:
            patch.setenv(change, "SOMETHING")
            assert verification.verdicts_path() != first
    for where, value in (("processor_digest", lambda: "?"), ("torch.__version__", "9")):
        verification.verdicts_path.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(f"autoquant.kernels.cpu.verification.{where}", value)
            assert verification.verdicts_path() != first


def test_the_child_sees_a_wrong_number_and_a_wrong_byte(monkeypatch):
    g = geometry()
    assert trying.is_right(g)
    run = onednn.ConvProduct.run
    for nth in range(3):
        calls = []

        def spoiled(self, *args, nth=nth, calls=calls):
            y = run(self, *args)
            calls.append(1)
            if len(calls) == nth + 1:
                last = y.flatten()[-1:]
                y[-1, -1, -1, -1] = last[0] * 1.001 if y.is_floating_point() else last[0] ^ 1
            return y

        with monkeypatch.context() as patch:
            patch.setattr(onednn.ConvProduct, "run", spoiled)
            assert not trying.is_right(g)
        assert len(calls) > nth


@pytest.mark.parametrize("answer", ["right", "wrong"])
def test_processes_that_fork_off_have_children_of_their_own(fresh, monkeypatch, answer):
    if not hasattr(os, "fork"):
        return
    program = f"print('ready', flush=True)\nfor _ in open(0): print({answer!r}, flush=True)"
    started = child(monkeypatch, program)
    assert is_right(geometry()) == (answer == "right")
    pid = os.fork()
    if not pid:  # the copy must not touch the pipes of the original
        found = is_right(geometry(threads=2)) == (answer == "right")
        os._exit(0 if found and len(started) == 2 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert is_right(geometry(threads=3)) == (answer == "right")
    assert len(started) == 1


def test_ctrl_c_is_not_for_the_child(fresh):
    if os.name != "posix":
        return
    assert is_right(geometry())
    process = verification._verdicts()._child
    assert os.getpgid(process.pid) != os.getpgid(os.getpid())
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert is_right(geometry(threads=2))  # another one is started
