"""Which backend computes what, and what is told of it."""

import pytest
import torch

from autoquant.errors import UserError
from autoquant.kernels.cpu import instructions, int16, native, onednn
from autoquant.kernels.engine import Engine, make_engine
from autoquant.kernels.operation import LINEAR
from autoquant.spec.recipe import ActivationScheme, WeightScheme
from tests.kernels.cases import quantized

CPU = torch.device("cpu")
EIGHT = ActivationScheme(8, scale=0.1, zero_point=0)


class Fixed:
    """A backend that takes one width."""

    def __init__(self, name, bits):
        self.name = name
        self.bits = bits

    def missing(self, device):
        return None

    def prepare(self, operation, weight, activation, device, transform=None):
        return self.name if weight.scheme.bits == self.bits else None


def test_the_first_backend_that_takes_it_computes_it():
    engine = Engine([Fixed("a", 4), Fixed("b", 4), Fixed("c", 8)])
    made = {
        bits: engine.prepare(LINEAR, quantized(torch.randn(2, 3), WeightScheme(bits)), None, CPU)
        for bits in (2, 4, 8)
    }
    assert made == {2: None, 4: "a", 8: "c"}


def test_time_is_counted_by_backend_the_busiest_first():
    engine = Engine()
    for name, seconds in (("float", 1.0), ("int8", 3.0), ("float", 1.0)):
        engine.note(name, seconds)
    shares = engine.shares()
    assert list(shares) == ["int8", "float"]
    assert (shares["float"].calls, shares["float"].seconds) == (2, 2.0)
    engine.reset()
    assert not engine.shares()


def test_the_reference_is_chosen_by_name_or_for_a_while():
    assert not make_engine(CPU, "reference").fast
    engine = make_engine(CPU)
    if engine.backends:
        assert engine.fast
        with engine.reference():
            assert not engine.fast
        assert engine.fast
    with pytest.raises(UserError, match="--backend warp: give one of auto, eager, reference"):
        make_engine(CPU, "warp")


def test_what_makes_it_slower_is_said(monkeypatch):
    monkeypatch.setattr(instructions, "has_vnni", lambda: False)
    if int16.missing() is None:
        assert [note.split("computed ")[1] for note in make_engine(CPU).notes] == ["in 16 bits"]
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(int16, "library", lambda: None)
    assert [note.split(":")[0] for note in make_engine(CPU).notes] == [
        "oneDNN uses no VNNI here",
        "the compiled quantizer is missing (no C compiler when autoquant was installed)",
    ]
    monkeypatch.setattr(onednn, "missing", lambda device: "this torch was built without oneDNN")
    engine = make_engine(CPU)
    assert not engine.fast
    assert "computed in float" in engine.notes[0]


def test_gates_are_the_references_where_it_is_asked_for():
    engine = make_engine(CPU)
    x, h = torch.randn(2, 12), torch.randn(2, 4)
    with torch.no_grad(), engine.reference():
        assert engine.gru_gates(x, x, h) is None
        assert engine.lstm_gates(torch.randn(2, 16), torch.randn(2, 16), h) is None
