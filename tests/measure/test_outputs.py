"""What calls return can be returned again: the same, and nobody else's."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from autoquant.measure.outputs import Inputs, checksum, fingerprint, pack
from autoquant.measure.pool import Pool
from autoquant.measure.reuse_check import same_bits
from autoquant.nn.layer_output import After, LayerOutput
from autoquant.spec.recipe import ActivationScheme

Pair = namedtuple("Pair", "first second")
WIDE = torch.arange(24.0).view(4, 6)


def again(result: Any, args: tuple[Any, ...] = (), now: tuple[Any, ...] = ()) -> Any:
    """Return what a kept ``result`` of a call with ``args`` gives to one with ``now``."""
    outputs = pack(result, Inputs(args, {}))
    if outputs is None:
        return "not kept"
    pool = Pool()
    outputs = outputs.kept(lambda memory: pool.copy(memory, 1 << 30))
    assert pool.bytes == outputs.bytes
    return outputs.give(now, {})


@pytest.mark.parametrize(
    "result",
    [
        WIDE,
        WIDE.t(),
        WIDE[:, 1:3],
        WIDE[1:2].expand(5, 6),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.tensor(3.0),
        torch.zeros(0, 3),
        torch.tensor([float("nan"), -0.0]),
        torch.randn(3, dtype=torch.complex64),
        torch.randn(3).bfloat16(),
        torch.tensor([True, False]),
        nn.Parameter(torch.randn(3)),
        (WIDE, None, 3, "a", [torch.ones(2)]),
        {"x": WIDE, "y": {"z": (torch.ones(1),)}},
        OrderedDict(b=WIDE, a=torch.ones(1)),
        Pair(WIDE, torch.ones(1)),
        pack_sequence([torch.ones(3), torch.ones(2)]),
        [],
    ],
)
def test_values_come_back_as_they_were(result):
    found = again(result)
    assert type(found) is type(result) or isinstance(result, nn.Parameter)
    assert same_bits(found, result)
    ours, theirs = torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(result)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, Tensor):
            assert (a.stride(), a.dtype) == (b.stride(), b.dtype)
            assert a is not b
            assert not a.numel() or a.data_ptr() != b.data_ptr()


def test_what_was_one_tensor_is_one_again_and_siblings_share_memory():
    left, right = torch.arange(8.0).view(2, 4).chunk(2, 1)
    whole = torch.arange(6.0)
    one, other, a, b, view, base = again((left, left, left, right, whole[2:], whole))
    assert one is other is a
    assert b.untyped_storage().data_ptr() == a.untyped_storage().data_ptr()
    view.zero_()
    assert base.tolist() == [0, 1, 0, 0, 0, 0]
    assert whole.tolist() == [0, 1, 2, 3, 4, 5]


def test_an_argument_is_given_back_and_a_view_of_one_is_not_kept():
    x, y = torch.ones(3), torch.zeros(3)
    found = again((x + 1, x), (x,), (y,))
    assert found[1] is y
    assert found[0].tolist() == [2, 2, 2]
    assert again(x[1:], (x,)) == "not kept"
    assert again(x.detach(), (x,)) == "not kept"


@pytest.mark.parametrize(
    "result",
    [
        object(),
        (WIDE, {1, 2}),
        torch.eye(3).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.ones(3, requires_grad=True) * 2,
    ],
)
def test_what_is_not_kept(result):
    assert again(result) == "not kept"


def test_results_cross_inference_mode():
    with torch.inference_mode():
        outputs = pack(torch.ones(30_000), Inputs((), {}))
        kept = outputs.kept(lambda memory: Pool().copy(memory, 1 << 30))
    assert not kept.give((), {}).add_(1).is_inference()
    with torch.inference_mode():
        kept.give((), {}).add_(1)
    kept.memories[0].copy_(torch.zeros(30_000))


def test_changes_of_arguments_are_noticed():
    x, notes, table = torch.ones(3), [1], {"a": 1}
    for change in (
        lambda: x.add_(1),
        lambda: x[1:].zero_(),
        lambda: notes.append(2),
        lambda: notes.__setitem__(0, 3),
        lambda: table.update(b=2),
    ):
        inputs = Inputs((x, notes), {"table": table})
        assert inputs.known
        assert not inputs.changed()
        change()
        assert inputs.changed()
    for watch in (False, True):
        inputs = Inputs((x,), {}, watch)
        x.numpy()[0] += 1
        assert inputs.changed() == watch
    assert not Inputs((object(),), {}).known


def test_checksums_and_fingerprints():
    x = torch.randn(50)
    before = checksum(x)
    x[7] += 1
    assert checksum(x) != before
    assert checksum(torch.zeros(0)) == 0
    assert fingerprint({"a": x, "b": (3, object())}) == [((50,), checksum(x)), 3]


def integers(after: After = None) -> LayerOutput:
    source = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    q = source.contiguous(memory_format=torch.channels_last)
    scheme = ActivationScheme(8, scale=0.1, zero_point=3)
    return LayerOutput.of(q, source, scheme, lambda s, _: s.float() / 7, source.stride(), after)


def test_an_output_that_stays_integers_comes_back_as_one():
    y = integers((0.0, 6.0))
    found = again(y)
    assert type(found) is LayerOutput
    assert not found.seen
    assert not y.seen
    assert torch.equal(found.held, y.held)
    assert found.held.stride() == y.held.stride()
    assert found.held.data_ptr() != y.held.data_ptr()
    assert (found.reader, found.stride(), found.ahead) == (y.reader, y.stride(), (0.0, 6.0))
    assert torch.equal(found + 0, y + 0)
    one, two, other = again((y, y, integers()))
    assert one is two is not other


def test_an_output_that_was_written_into_is_not_kept_and_a_lookup_reads_no_numbers():
    x = integers()
    inputs = Inputs((x,), {}, watch=True)
    fingerprint(x)
    assert inputs.known
    assert not inputs.changed()
    assert not x.seen
    assert again((torch.ones(1), x), (x,), (x,))[1] is x
    x.mul_(2)
    assert inputs.changed()
    assert again(x) == "not kept"
