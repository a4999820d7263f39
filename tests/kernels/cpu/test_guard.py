"""The allocator that the child runs under ends it where something is written beyond a block."""

import os
import signal
import subprocess
import sys

import pytest

from autoquant.kernels.cpu.verification import guard_path

pytestmark = pytest.mark.skipif(
    guard_path() is None, reason="NOT RUN: guard.c is for Linux with glibc and a C compiler"
)

HEAD = """
import ctypes, sys
libc = ctypes.CDLL(None)
for name in ("malloc", "calloc", "realloc", "memalign", "aligned_alloc"):
    getattr(libc, name).restype = ctypes.c_void_p
libc.malloc_usable_size.restype = ctypes.c_size_t
P, N = ctypes.c_void_p, ctypes.c_size_t
on = libc.autoquant_guard
def byte(block, i):
    return ctypes.c_ubyte.from_address(block + i)
before = libc.malloc(N(100000))
on(1)
"""


def run(program):
    return subprocess.run(
        [sys.executable, "-c", HEAD + program],
        env=os.environ | {"LD_PRELOAD": str(guard_path())},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_memory_is_given_and_taken_back_as_always():
    done = run("""
import threading
for size in (0, 1, 15, 16, 31, 32, 33, 255, 4095, 4096, 4097, 100_000, 5_000_000):
    for make in (lambda: libc.malloc(N(size)), lambda: libc.memalign(N(4096), N(size))):
        block = make()
        assert block % 16 == 0
        assert libc.malloc_usable_size(P(block)) == size
        ctypes.memset(block, 7, size)
        larger = libc.realloc(P(block), N(size + 9))
        assert bytes((ctypes.c_ubyte * size).from_address(larger)) == b"\\7" * size
        libc.free(P(larger))
    zeros = libc.calloc(N(size), N(1))
    assert not any((ctypes.c_ubyte * size).from_address(zeros))
    libc.free(P(zeros))
for alignment in (16, 64, 256, 4096):
    out = P()
    assert libc.posix_memalign(ctypes.byref(out), N(alignment), N(100)) == 0
    assert out.value % alignment == 0
    libc.free(out)
assert libc.posix_memalign(ctypes.byref(out), N(24), N(8)) != 0
assert libc.malloc(N(2**63 - 1)) is None and libc.calloc(N(2**40), N(2**40)) is None
many = [libc.malloc(N(40)) for _ in range(40_000)]  # more than there are pages for
def work():
    for i in range(5000):
        libc.free(P(libc.malloc(N(i % 700))))
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
on(0)
for block in many:
    libc.free(P(block))
libc.free(P(libc.realloc(P(before), N(200_000))))
print("fine")
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fine\n"


@pytest.mark.parametrize("size", [1, 20, 40, 1000, 4096, 70_000])
@pytest.mark.parametrize(
    ("offset", "what"), [(0, "end"), (20, "end"), (-1, "begin"), (-9, "begin")]
)
def test_what_writes_beyond_a_block_is_ended(size, offset, what):
    place = size + offset if what == "end" else offset
    done = run(f"""
block = libc.malloc(N({size}))
print("before", flush=True)
byte(block, {place}).value = 1
libc.free(P(block))
print("after", flush=True)
""")
    assert done.stdout == "before\n"
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)


def test_what_reads_far_beyond_a_block_is_ended_and_new_memory_is_no_zeros():
    done = run("""
block = libc.malloc(N(1000))
assert byte(block, 0).value == byte(block, 999).value != 0
print("before", flush=True)
print(byte(block, 1016).value, flush=True)
""")
    assert (done.stdout, done.returncode) == ("before\n", -signal.SIGSEGV)


def test_while_it_is_switched_off_nothing_is_watched():
    done = run("""
on(0)
block = libc.malloc(N(1000))
assert byte(block, 1000) is not None
assert libc.malloc_usable_size(P(block)) >= 1000
libc.free(P(block))
print("fine")
""")
    assert (done.stdout, done.returncode) == ("fine\n", 0)
