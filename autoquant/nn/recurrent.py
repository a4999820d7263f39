"""Quantized recurrent layers: LSTM, GRU and RNN unrolled in aten operators, and their cells.

The fused kernels of torch read the float weights directly, and no quantizer can be placed between
their time steps. Here the input projection of a whole sequence stays one matrix product, and only
the recurrent product runs step by step, on a hidden state that is quantized at every step.

Packed sequences are computed on their valid entries only, as they lie in ``PackedSequence.data``:
no quantizer ever sees padding.

Equations and order of the gates: those of torch.nn.LSTM (Hochreiter & Schmidhuber 1997, projections
as in Sak et al. 2014, arXiv 1402.1128) and torch.nn.GRU (Cho et al. 2014, arXiv 1406.1078, with
the reset gate behind the recurrent product).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from autoquant.kernels.engine import Engine
from autoquant.nn.converted import Converted
from autoquant.nn.runtime import Multiply

State = tuple[Tensor, ...]
"""What one time step hands to the next: (h,), or (h, c) in an LSTM, each [batch, features]."""

Step = Callable[[Tensor, State], State]
"""One time step: projected input [batch, gates] and state → new state."""

Function = Callable[[Tensor], Tensor]


class _Sited:
    """What one call of a layer computes by; a weight without a site stays in float.

    Nothing of it is an attribute of the layer: a subclass of the user's may have any names.
    """

    def __init__(self, converted: Converted) -> None:
        self.layer: Any = converted.module
        self.sites = converted.sites
        self.rest = converted.rest

    def _own(self, name: str) -> Tensor | None:
        """Return a bias or a weight in the format that is computed in, None where there is none."""
        own: Tensor | None = getattr(self.layer, name, None)
        return own if own is None or self.rest is None else own.to(torch.float32)

    def _given(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return what the layer is given: rounded to the rest's format, and computed with as it is.

        Gates and states are float32 within a call, whatever the rest is.
        """
        if self.rest is None:
            return tensors
        return tuple(x.to(self.rest).to(torch.float32) for x in tensors)

    def _gives(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return what the layer gives, in the format of the rest."""
        return tensors if self.rest is None else tuple(x.to(self.rest) for x in tensors)

    def _product(self, name: str) -> Multiply:
        """Return the product with the weight ``name``."""
        if name in self.sites:
            return self.sites[name].linear(None)[0]
        weight = self._own(name)
        assert weight is not None
        return lambda x, bias: F.linear(x, weight, bias)

    def _engine(self) -> Engine | None:
        """Return what may compute the gates; a saved model has none."""
        site = next(iter(self.sites.values()), None)
        return getattr(site, "engine", None)


# --- one time step ---------------------------------------------------------------------------


def _lstm_step(product: Multiply, projection: Function | None, engine: Engine | None) -> Step:
    """Return an LSTM's step; both biases are in the projected input already."""

    def step(x: Tensor, state: State) -> State:
        h, c = state
        y = product(h, None)
        fused = None if engine is None else engine.lstm_gates(x, y, c)
        if fused is not None:
            h, c = fused
        else:
            i, f, g, o = (y + x).chunk(4, 1)
            c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
            h = o.sigmoid() * c.tanh()
        return (h if projection is None else projection(h)), c

    return step


def _gru_step(product: Multiply, bias: Tensor | None, engine: Engine | None) -> Step:
    """Return a GRU's step; ``bias`` is inside the reset gate, so it can't join the input's."""

    def step(x: Tensor, state: State) -> State:
        (h,) = state
        y = product(h, bias)
        fused = None if engine is None else engine.gru_gates(x, y, h)
        if fused is not None:
            return (fused,)
        x_r, x_z, x_n = x.chunk(3, 1)
        h_r, h_z, h_n = y.chunk(3, 1)
        reset = (x_r + h_r).sigmoid_()
        update = (x_z + h_z).sigmoid_()
        new = torch.addcmul(x_n, reset, h_n).tanh_()
        return (torch.lerp(new, h, update),)

    return step


def _rnn_step(product: Multiply, activation: Function) -> Step:
    """Return an Elman network's step; both biases are in the projected input already."""

    def step(x: Tensor, state: State) -> State:
        return (activation(product(state[0], None) + x),)

    return step


# --- all time steps --------------------------------------------------------------------------


def _unroll(
    step: Step, inputs: Sequence[Tensor], initial: State, sizes: Sequence[int] | None
) -> tuple[list[Tensor], State]:
    """Return the output of every time step, in the order of ``inputs``, and the final state.

    ``sizes`` are the batch sizes of a packed sequence (None: every sequence is as long). Where the
    batch shrinks, the sequences at its end are over and keep their state; where it grows, as it
    does in a packed sequence read backwards, they start from their initial state.
    """
    outputs = []
    if sizes is None:
        state = initial
        for x in inputs:
            state = step(x, state)
            outputs.append(state[0])
        return outputs, state
    live = sizes[0]
    state = tuple(s[:live] for s in initial)
    over: list[State] = []
    for x, size in zip(inputs, sizes, strict=True):
        if size < live:
            over.append(tuple(s[size:] for s in state))
            state = tuple(s[:size] for s in state)
        elif size > live:
            fresh = tuple(s[live:size] for s in initial)
            state = tuple(torch.cat(pair) for pair in zip(state, fresh, strict=True))
        live = size
        state = step(x, state)
        outputs.append(state[0])
    if over:
        state = tuple(torch.cat(parts) for parts in zip(state, *reversed(over), strict=True))
    return outputs, state


class _Recurrent(_Sited):
    """What LSTM, GRU and RNN share; a subclass gives its step and the sizes of its states."""

    def _input_bias(self, suffix: str) -> Tensor | None:
        """Return the bias of the input projection: both, unless a subclass keeps them apart."""
        if not self.layer.bias:
            return None
        one, other = (self._own(f"bias_{part}_{suffix}") for part in ("ih", "hh"))
        assert one is not None
        assert other is not None
        return one + other

    def _step(self, suffix: str) -> Step:
        raise NotImplementedError

    def _direction(
        self, x: Tensor, initial: State, suffix: str, sizes: list[int] | None
    ) -> tuple[Tensor, State]:
        """Return one layer's output in one direction, laid out as ``x``, and its final state.

        ``x`` is [time, batch, features], or [valid entries, features] with ``sizes``.
        """
        projected = self._product(f"weight_ih_{suffix}")(x, self._input_bias(suffix))
        inputs = list(projected.unbind(0) if sizes is None else projected.split(sizes))
        backwards = suffix.endswith("_reverse")
        if backwards:
            inputs.reverse()
            sizes = sizes[::-1] if sizes is not None else None
        initial = tuple(s.to(projected.dtype) for s in initial)  # they differ under autocast
        outputs, final = _unroll(self._step(suffix), inputs, initial, sizes)
        if backwards:
            outputs.reverse()
        return torch.stack(outputs) if sizes is None else torch.cat(outputs), final

    def _layers(self, x: Tensor, initial: State, sizes: list[int] | None) -> tuple[Tensor, State]:
        """Return the last layer's output, laid out as ``x``, and all final states, stacked.

        Each of ``initial`` is [layers × directions, batch, features].
        """
        finals: list[State] = []
        starts = list(zip(*(s.unbind(0) for s in initial), strict=True))
        for layer in range(self.layer.num_layers):
            suffixes = [f"l{layer}", f"l{layer}_reverse"][: 2 if self.layer.bidirectional else 1]
            outputs = []
            for suffix in suffixes:
                output, final = self._direction(x, starts[len(finals)], suffix, sizes)
                outputs.append(output)
                finals.append(final)
            x = torch.cat(outputs, -1) if self.layer.bidirectional else outputs[0]
            if self.layer.training and self.layer.dropout and layer < self.layer.num_layers - 1:
                x = F.dropout(x, self.layer.dropout)
        return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def _run(
        self, x: Tensor | PackedSequence, initial: State | None
    ) -> tuple[Tensor | PackedSequence, State]:
        """Return what the float layer's forward returns, with the states as a tuple."""
        initial = None if initial is None else self._given(*initial)
        if isinstance(x, PackedSequence):
            (data,) = self._given(x.data)
            output, final = self._run_packed(x._replace(data=data), initial)
            (data,) = self._gives(output.data)
            return output._replace(data=data), self._gives(*final)
        (x,) = self._given(x)
        y, final = self._run_padded(x, initial)
        (y,) = self._gives(y)
        return y, self._gives(*final)

    def _run_padded(self, x: Tensor, initial: State | None) -> tuple[Tensor, State]:
        if x.dim() not in (2, 3):
            raise ValueError(f"{self.layer.mode}: expected a 2-D or 3-D input, got {x.dim()}-D")
        batched = x.dim() == 3
        if batched and self.layer.batch_first:
            x = x.transpose(0, 1)
        elif not batched:
            x = x.unsqueeze(1)
        if initial is None:
            initial = self._zeros(x, x.size(1))
        else:
            if any(s.dim() != 2 + batched for s in initial):
                raise RuntimeError(
                    f"{self.layer.mode}: input and state must both have a batch, or none"
                )
            if not batched:
                initial = tuple(s.unsqueeze(1) for s in initial)
        self._check(x, initial, x.size(1))
        output, final = self._layers(x, initial, None)
        if batched:
            return output.transpose(0, 1) if self.layer.batch_first else output, final
        return output.squeeze(1), tuple(s.squeeze(1) for s in final)

    def _run_packed(
        self, packed: PackedSequence, initial: State | None
    ) -> tuple[PackedSequence, State]:
        sizes = packed.batch_sizes.tolist()
        if initial is None:
            initial = self._zeros(packed.data, sizes[0])
        elif packed.sorted_indices is not None:
            initial = tuple(s.index_select(1, packed.sorted_indices) for s in initial)
        self._check(packed.data, initial, sizes[0])
        data, final = self._layers(packed.data, initial, sizes)
        if packed.unsorted_indices is not None:
            final = tuple(s.index_select(1, packed.unsorted_indices) for s in final)
        output = PackedSequence(
            data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        )
        return output, final

    def _state_sizes(self) -> tuple[int, ...]:
        """Return the number of features of each state."""
        return (self.layer.hidden_size,)

    def _zeros(self, x: Tensor, batch: int) -> State:
        rows = self.layer.num_layers * (2 if self.layer.bidirectional else 1)
        return tuple(x.new_zeros(rows, batch, size) for size in self._state_sizes())

    def _check(self, x: Tensor, initial: State, batch: int) -> None:
        if x.size(-1) != self.layer.input_size:
            raise RuntimeError(
                f"{self.layer.mode}: expected {self.layer.input_size} input features, "
                f"got {x.size(-1)}"
            )
        rows = self.layer.num_layers * (2 if self.layer.bidirectional else 1)
        for state, size in zip(initial, self._state_sizes(), strict=True):
            if tuple(state.shape) != (rows, batch, size):
                raise RuntimeError(
                    f"{self.layer.mode}: expected hidden size {(rows, batch, size)}, "
                    f"got {tuple(state.shape)}"
                )


class QuantizedLSTM(_Recurrent):
    """An LSTM with quantized input, recurrent and projection weights and their inputs."""

    def _state_sizes(self) -> tuple[int, ...]:
        return self.layer.proj_size or self.layer.hidden_size, self.layer.hidden_size

    def _step(self, suffix: str) -> Step:
        product = self._product(f"weight_hh_{suffix}")
        if not self.layer.proj_size:
            return _lstm_step(product, None, self._engine())
        down = self._product(f"weight_hr_{suffix}")
        return _lstm_step(product, lambda h: down(h, None), self._engine())

    def __call__(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Return (output, (h_n, c_n)) in the shapes of ``nn.LSTM``."""
        output, (h, c) = self._run(input, hx)
        return output, (h, c)


class _OneState(_Recurrent):
    """A recurrent layer whose state is its output."""

    def __call__(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Return (output, h_n) in the shapes of the float layer."""
        output, (h,) = self._run(input, None if hx is None else (hx,))
        return output, h


class QuantizedGRU(_OneState):
    """A GRU with quantized input and recurrent weights and their inputs."""

    def _input_bias(self, suffix: str) -> Tensor | None:
        return self._own(f"bias_ih_{suffix}") if self.layer.bias else None

    def _step(self, suffix: str) -> Step:
        product = self._product(f"weight_hh_{suffix}")
        return _gru_step(product, self._own(f"bias_hh_{suffix}"), self._engine())


class QuantizedRNN(_OneState):
    """An Elman network (tanh or ReLU) with quantized weights and their inputs."""

    def _step(self, suffix: str) -> Step:
        product = self._product(f"weight_hh_{suffix}")
        return _rnn_step(product, torch.relu if self.layer.mode == "RNN_RELU" else torch.tanh)


# --- cells: one time step called by the user's own loop ----------------------------------------


class _Cell(_Sited):
    """What the cells share; a subclass gives its step and how many states it carries."""

    def _sum_of_biases(self) -> Tensor | None:
        one, other = self._own("bias_ih"), self._own("bias_hh")
        return None if one is None or other is None else one + other

    def _advance(self, x: Tensor, state: State, bias: Tensor | None, step: Step) -> State:
        """Return the state after ``x`` ([batch, features] or [features], like the states)."""
        if x.dim() not in (1, 2) or any(s.dim() != x.dim() for s in state):
            raise ValueError("a recurrent cell takes 1-D or 2-D input, and states that match it")
        x, *given = self._given(x, *state)
        return self._gives(*self._next(x, tuple(given), bias, step))

    def _next(self, x: Tensor, state: State, bias: Tensor | None, step: Step) -> State:
        projected = self._product("weight_ih")(x, bias)
        if x.dim() == 2:
            return step(projected, tuple(s.to(projected.dtype) for s in state))
        state = tuple(s.unsqueeze(0).to(projected.dtype) for s in state)
        return tuple(s.squeeze(0) for s in step(projected.unsqueeze(0), state))

    def _zero(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.layer.hidden_size)


class QuantizedLSTMCell(_Cell):
    """An LSTM cell with quantized weights and inputs."""

    def __call__(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (h, c) in the shapes of ``nn.LSTMCell``."""
        state = hx if hx is not None else (self._zero(input), self._zero(input))
        step = _lstm_step(self._product("weight_hh"), None, self._engine())
        h, c = self._advance(input, state, self._sum_of_biases(), step)
        return h, c


class QuantizedGRUCell(_Cell):
    """A GRU cell with quantized weights and inputs."""

    def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return h in the shape of ``nn.GRUCell``'s."""
        state = (hx if hx is not None else self._zero(input),)
        step = _gru_step(self._product("weight_hh"), self._own("bias_hh"), self._engine())
        return self._advance(input, state, self._own("bias_ih"), step)[0]


class QuantizedRNNCell(_Cell):
    """An Elman cell (tanh or ReLU) with quantized weights and inputs."""

    def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return h in the shape of ``nn.RNNCell``'s."""
        state = (hx if hx is not None else self._zero(input),)
        activation = torch.relu if self.layer.nonlinearity == "relu" else torch.tanh
        step = _rnn_step(self._product("weight_hh"), activation)
        return self._advance(input, state, self._sum_of_biases(), step)[0]
