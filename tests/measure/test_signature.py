"""What of a call makes its program, and what is only data."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from autoquant.measure.signature import Given, given, returned
from tests.devices.simulated import GPU, SimulatedGPU

CPU = torch.device("cpu")


def shape(*args, device=CPU, **kwargs):
    found = given(args, kwargs, device)
    assert isinstance(found, Given), found
    return found.shape


def test_numbers_of_tensors_are_data_and_all_else_is_shape():
    x = torch.ones(2, 3)
    assert shape(x, 1, a=None) == shape(torch.zeros(2, 3), 1, a=None)
    others = [
        (torch.ones(3, 2), 1),
        (torch.ones(2, 3).double(), 1),
        (torch.ones(3, 2).T, 1),
        (x, 2),
        (x, 1.0),
        (x, True),
        ([x], 1),
    ]
    assert all(shape(*args, a=None) != shape(x, 1, a=None) for args in others)
    assert shape(x, x) != shape(x, x.clone())  # one tensor twice is one


def test_arguments_are_put_together_again():
    x, y = torch.ones(2), torch.zeros(3)
    found = given((x, {"a": [y, 1, x]}), {"b": "text"}, CPU)
    assert isinstance(found, Given)
    args, kwargs = found.rebuilt([-t for t in found.tensors])
    assert torch.equal(args[0], -x)
    assert args[1]["a"][2] is args[0]
    assert args[1]["a"][1] == 1
    assert kwargs == {"b": "text"}


def test_tensors_that_lie_over_themselves_are_given_room():
    x = torch.arange(3.0).expand(2, 3)
    found = given((x,), {}, CPU)
    assert isinstance(found, Given)
    fixed = found.fixed()[0]
    fixed[0].zero_()
    assert torch.equal(fixed[1], x[1])


def test_lengths_on_the_host_make_the_program():
    def packed(*lengths):
        kept = pack_sequence([torch.zeros(n) for n in lengths])
        return kept._replace(data=kept.data.to("cuda"))

    with SimulatedGPU():
        assert shape(packed(4, 2), device=GPU) == shape(packed(4, 2), device=GPU)
        assert shape(packed(4, 2), device=GPU) != shape(packed(3, 3), device=GPU)
        lengths = torch.tensor([4, 2])
        found = given((lengths,), {}, GPU)
        assert isinstance(found, Given)
        lengths.zero_()  # the caller's own
        assert found.rebuilt([])[0][0].tolist() == [4, 2]
        assert given((torch.zeros(2),), {}, GPU) == "is given a tensor on cpu"


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((object(),), "is given a object"),
        ((torch.zeros(2).to_sparse(),), "is given a tensor that is not dense"),
        ((torch.zeros(4)[:2], torch.zeros(4)[2:]), None),
    ],
)
def test_what_cannot_be_recorded_is_said(args, why):
    found = given(args, {}, CPU)
    assert found == why if why else isinstance(found, Given)


def test_two_tensors_of_one_memory_are_refused():
    x = torch.zeros(4)
    assert given((x[:2], x[2:]), {}, CPU) == "is given two tensors of one memory"
    assert returned({"a": object()}) == "returns a object"
