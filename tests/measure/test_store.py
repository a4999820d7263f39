"""A store of results: within its bytes, and the least valuable out first."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoquant.measure.outputs import Inputs, pack
from autoquant.measure.store import HALF_LIFE, OVERHEAD, REPAID, Kept, Store

KIB = 1024


def kept(name: int, tensor: Tensor, worth: float = 1.0) -> Kept:
    outputs = pack(tensor, Inputs((), {}))
    assert outputs is not None
    return Kept(((bytes([name]), -1), (0,), (7,)), outputs, b"", worth, worth)


def block(kib: int) -> Tensor:
    return torch.zeros(kib * KIB, dtype=torch.uint8)


def names(store: Store) -> set[int]:
    return {entry.key[0][0][0] for entry in store}


def held(store: Store) -> int:
    """Return the bytes of the store, counted anew."""
    free = [t for tensors in store._pool._free.values() for t in tensors]
    lent = [t for entry in store for t in entry.outputs.memories]
    return sum(t.nbytes for t in free + lent) + OVERHEAD * len(store)


def test_a_result_is_found_under_the_choices_it_was_made_with():
    store = Store(100 * KIB)
    one = kept(1, block(4))
    assert store.add(one)
    assert store.find((b"\x01", -1), [7, 3]) is one
    assert store.find((b"\x01", -1), [8, 3]) is None
    assert store.find((b"\x01", 0), [7, 3]) is None
    assert store.find((b"\x02", -1), [7, 3]) is None
    assert store.bytes == 4 * KIB + OVERHEAD
    store.drop(one)
    store.drop(one)
    assert (len(store), store.find((b"\x01", -1), [7])) == (0, None)
    assert store.bytes == 4 * KIB  # free for the next


def test_what_saves_least_for_its_bytes_goes_first():
    store = Store(3 * (10 * KIB + OVERHEAD))
    for name, worth in ((1, 3.0), (2, 1.0), (3, 2.0)):
        assert store.add(kept(name, block(10), worth))
    assert store.add(kept(4, block(10), 4.0))
    assert names(store) == {1, 3, 4}
    assert not store.add(kept(5, block(10), 2.0))  # no better than the worst
    assert store.add(kept(6, block(10), 3.0))
    assert names(store) == {1, 4, 6}


def test_a_large_result_does_not_push_out_many_small_ones():
    store = Store(64 * KIB)
    for name in range(20):
        assert store.add(kept(name, block(2), 1.0))
    assert not store.add(kept(100, block(60), 10.0))
    assert len(store) == 20
    assert not store.add(kept(101, block(65), 1e9))  # never fits
    assert len(store) == 20
    assert store.add(kept(102, block(60), 1000.0))
    assert names(store) >= {102}


def test_what_nobody_asks_for_loses_its_worth():
    store = Store(2 * (10 * KIB + OVERHEAD))
    old, asked = kept(1, block(10), 4.0), kept(2, block(10), 4.0)
    assert store.add(old)
    assert store.add(asked)
    for _ in range(2 * HALF_LIFE):
        store.round += 1
        store.touch(asked)
    assert store.add(kept(3, block(10), 2.0))
    assert names(store) == {2, 3}


def test_memory_is_used_again():
    store = Store(2 * (200 * KIB + OVERHEAD))
    one, two = kept(1, block(200)), kept(2, block(200), 2.0)
    assert store.add(one)
    assert store.add(two)
    (memory,) = one.outputs.memories
    three = kept(3, block(200) + 5, 3.0)
    assert store.add(three)
    assert three.outputs.memories[0] is memory
    assert bool((memory == 5).all())
    assert names(store) == {2, 3}
    assert store.add(kept(4, block(100), 9.0))  # of another size: what is free is given back
    assert names(store) == {3, 4}
    assert store.bytes == held(store) <= store.budget


def test_fresh_memory_must_pay_for_itself():
    store = Store(10 << 20)
    store._pool._seconds_per_byte = 1.0
    assert not store.add(kept(1, block(100), 100 * KIB / REPAID - 1))
    assert store._pool._seconds_per_byte < 1.0
    assert store.add(kept(1, block(100), 100 * KIB / REPAID + 1))
    assert store._pool._seconds_per_byte < 0.9  # measured
    store._pool._seconds_per_byte = 1.0
    for entry in store:
        store.drop(entry)
    store._pool._seconds_per_copied = 0.0
    assert store.add(kept(2, block(100), 1e-9))  # costs no fresh memory
    assert store.add(kept(3, block(1), 1e-9))  # nor does what has no pages of its own


def test_a_result_must_be_worth_its_copying():
    store = Store(10 << 20)
    store._pool._seconds_per_copied = 1e-6
    entry = kept(1, block(100), 1.0)
    assert store.add(entry)
    store.drop(entry)
    assert not store.add(kept(2, block(100), 0.1))  # copied and copied back: 0.2 seconds
    assert store.add(kept(3, block(100), 0.3))


def test_the_same_call_is_kept_once():
    store = Store(100 * KIB)
    assert store.add(kept(1, block(4)))
    again = kept(1, block(6))
    assert store.add(again)
    assert store.find((b"\x01", -1), [7]) is again
    assert store.bytes == 10 * KIB + OVERHEAD  # the first one's memory is free
    store.clear()
    assert (store.bytes, len(store)) == (0, 0)
    assert store.find((b"\x01", -1), [7]) is None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(0, 9), st.integers(0, 3)),
        max_size=60,
    )
)
def test_never_beyond_the_budget(steps):
    store = Store(40 * KIB)
    memory = [block(kib) for kib in range(10)]
    for name, kib, worth, what in steps:
        entry = kept(name, memory[kib] if what else block(kib), worth)
        if what == 2 and (found := store.find(entry.key[0], [7])) is not None:
            store.touch(found)
        elif what == 3:
            store.round += 1
        else:
            store.add(entry)
        assert store.bytes == held(store) <= store.budget


def test_the_heap_stays_small():
    store = Store(100 * KIB)
    entry = kept(1, block(1))
    assert store.add(entry)
    for _ in range(400):
        store.round += 1
        store.touch(entry)
    assert len(store._heap) < 80
    assert store.add(kept(2, block(98), 1e6))
    assert names(store) == {2}
