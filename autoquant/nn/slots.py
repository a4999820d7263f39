"""Slots: what a site computes with while recipes are being tried.

A slot is switched from one recipe to the next in place, without touching the model around it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoquant.kernels.engine import FLOAT, Engine, recorded
from autoquant.kernels.layout import contiguous_stride, is_channels_last
from autoquant.kernels.operation import (
    LINEAR,
    Chainable,
    Operation,
    Product,
    Reader,
    is_adding,
    is_chainable,
)
from autoquant.nn.fixed import Fixed, Tell
from autoquant.nn.held import HeldWeight
from autoquant.nn.layer_output import After, LayerOutput, as_real
from autoquant.nn.runtime import Layer, Multiply, Rows
from autoquant.nn.sites import Site
from autoquant.nn.sums import Call, Summand
from autoquant.quant.activation import wants_gradient
from autoquant.quant.transforms import InputTransform
from autoquant.spec.recipe import FLOAT_SITE, ActivationScheme, SiteRecipe

Listen = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor], Rows], Tensor]
"""Stands behind a layer: (input, output, compute, rows of the weight) → output."""


@dataclass(frozen=True)
class StandIn:
    """What a site computes with instead of its own: a weight, and what ``bias`` makes of its own.

    The weight has the parameter's shape and dtype; gradients may pass through both.
    """

    weight: Tensor
    bias: Callable[[Tensor | None], Tensor | None]


class SiteSlot:
    """The switchable runtime of one site: float until told otherwise.

    ``held`` replaces the parameter, ``activation`` quantizes the input, ``observe`` sees the
    input before that, and ``read`` is told when the weight is used. ``probe`` stands between the
    input and a float layer, and ``offset`` [channels] is added to the bias of one: gradients of
    both say how much the site matters. ``listen`` (input, output, compute, rows) stands behind a
    float layer instead, where ``compute`` (input) is the layer, on ``rows`` of the weight; while
    ``stand_in`` is set, it computes with that. ``choice`` names what the slot was
    switched to, None where that has no name; ``used`` is told before anything depends on it.
    ``refused`` says what the model's code did that a quantized weight can't have. ``fixed`` is the
    memory to compute in where that has to stay where it is. With a ``rest`` all else in the model
    is of that format (``nn.rest``): ``exact`` is the weight before it was rounded to it.

    Where there is a ``transform``, all that is quantized, calibrated or probed is on its other
    side: the input that it makes and the weight that meets that (``target``). Float layers, and
    whoever reads the weight, have x and the weight that meets x.
    """

    def __init__(self, site: Site, parameter: nn.Parameter, engine: Engine) -> None:
        self.site = site
        self.parameter = parameter
        self.engine = engine
        self.held: HeldWeight | None = None
        self.activation: ActivationScheme | None = None
        self.observe: Callable[[Tensor], None] | None = None
        self.probe: Callable[[Tensor], Tensor] | None = None
        self.offset: Tensor | None = None
        self.listen: Listen | None = None
        self.stand_in: StandIn | None = None
        self.read: Callable[[], None] | None = None
        self.choice: SiteRecipe | None = FLOAT_SITE
        self.used: Callable[[], None] | None = None
        self.refused: str | None = None
        self.fixed: Fixed | None = None
        self.transform: InputTransform | None = None
        self.rest: torch.dtype | None = None
        self.exact: Tensor | None = None
        self._wide = False
        self._target: Tensor | None = None

    def transform_input(self, transform: InputTransform | None) -> None:
        """Transform the input from now on, or no more. What was calibrated before is void."""
        self.transform = transform
        self._target = None

    @property
    def target(self) -> Tensor:
        """The weight that is to be quantized."""
        if self.transform is None:
            return self.source
        if self._target is None:
            self._target = self.transform.of_weight(self.source.to(torch.float32))
        return self._target

    @property
    def source(self) -> Tensor:
        """The weight as the float model has it."""
        return self.parameter.detach() if self.exact is None else self.exact

    def use(self) -> None:
        """Say that what follows depends on ``choice``; every way to compute calls this first."""
        if self.used is not None:
            self.used()

    def switch(self, held: HeldWeight | None, activation: ActivationScheme | None) -> None:
        """Compute with another weight and activation from now on; None means float.

        Raises ValueError where a static activation scheme has no scale.
        """
        if activation is not None and activation.scale is None and not activation.dynamic:
            raise ValueError("a static activation scheme must be calibrated before it is used")
        self.held = held
        self.activation = activation
        self.choice = None

    def is_float(self, reason: str) -> bool:
        """Return whether nothing is quantized here, and note why nothing can be."""
        self.refused = reason
        return self.held is None and self.activation is None

    @property
    def weight(self) -> Tensor:
        """The weight to compute with, in the parameter's shape and dtype."""
        self._tell()
        return self._real()

    def bias(self, own: Tensor | None) -> Tensor | None:
        """Return the bias to compute with: the layer's ``own`` one, corrected where it is to be."""
        if self.stand_in is not None:
            return self.stand_in.bias(own)
        moved: Tensor | None = self._settled(("bias", own))
        found = own if moved is None else moved
        if self.rest is not None and found is not None:
            found = found.to(self.rest)
            return found.to(torch.float32) if self._wide else found
        if self.offset is None:
            return found
        return self.offset if found is None else found + self.offset

    def _tell(self) -> None:
        """Tell whoever listens that the weight is about to be used."""
        self.use()
        if self.read is not None:
            self.read()

    def _real(self) -> Tensor:
        if self.stand_in is not None:
            return self.stand_in.weight
        if self._wide:
            return self._wide_weight()
        real: Tensor | None = self._settled(("weight",))
        return self.parameter if real is None else real

    def _wide_weight(self) -> Tensor:
        """Return the weight in float32; one that stays in float was rounded to ``rest``."""
        real: Tensor | None = self._settled(("wide weight",))
        return self.parameter.to(torch.float32) if real is None else real

    def make_fixed(self, tell: Tell) -> Fixed:
        """Return memory that stays where it is for all that is computed with here."""
        return Fixed(self._ask, tell, lambda: {} if self.held is None else self.held.forms)

    @property
    def is_watched(self) -> bool:
        """Whether somebody looks at, or changes, what is computed here."""
        hooks = self.observe, self.probe, self.offset, self.listen, self.stand_in, self.read
        return any(hook is not None for hook in hooks)

    def _ask(self, key: Any) -> Any:
        """Return what ``key`` names: all that a recipe decides here."""
        held = self.held
        match key:
            case ("product", operation, rows):
                return self._own_product(operation, rows)
            case ("weight",):
                return None if held is None else held.real(self.parameter)
            case ("wide weight",):
                return None if held is None else held.real(self.parameter, torch.float32)
            case ("quantized",):
                return held is not None or self.activation is not None
            case ("bias", own):
                return None if held is None or held.shift is None else held.bias(own)
            case ("activation",):
                return self.activation
            case ("transform",):
                return self.transform
        raise AssertionError(key)

    def _settled(self, key: Hashable) -> Any:
        """Return what ``key`` names, in memory that stays where it is if that is wanted."""
        found = self._ask(key)
        return found if self.fixed is None else self.fixed.put(key, found)

    def quantize_input(self, x: Tensor) -> Tensor:
        """Return the activation to compute with."""
        self.use()
        if self.observe is not None:
            if recorded():
                self.refused = "runs inside a transform of torch.func or a trace of torch.jit"
                return x
            with torch.autocast(x.device.type, enabled=False):
                self.observe(self._transformed(x if self.rest is None else x.float()))
        activation: ActivationScheme | None = self._settled(("activation",))
        if self.probe is None and activation is None:
            return x
        x = self._transformed(x)
        if self.probe is not None:
            x = self.probe(x)
        if activation is not None:
            x = self.engine.fake_quantize(x, activation, self.site.kind)
        transform: InputTransform | None = self._settled(("transform",))
        return x if transform is None else transform.input_back(x)

    def _transformed(self, x: Tensor) -> Tensor:
        transform: InputTransform | None = self._settled(("transform",))
        return x if transform is None else transform.of_input(as_real(x))

    def layer(
        self,
        layer: Layer,
        x: Tensor,
        bias: Tensor | None,
        compute: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return a layer's output on ``x``, by a kernel or by ``compute``.

        Where the rest is of a lower format, a quantized layer takes its input and gives its output
        in that, and computes in float32 between the two.
        """
        if self.rest is None or not self._settled(("quantized",)):
            return self._layer(layer, x, bias, compute)
        bias = None if bias is None else bias.to(torch.float32)
        with self._widened(x):
            y = self._layer(layer, x.to(self.rest).to(torch.float32), bias, compute)
        return y.to(self.rest)

    @contextlib.contextmanager
    def _widened(self, x: Tensor) -> Iterator[None]:
        """Compute in float32 inside: whoever reads weight or bias gets that."""
        self._wide = True
        try:
            if torch.is_autocast_enabled(x.device.type):
                with torch.autocast(x.device.type, enabled=False):
                    yield
            else:
                yield
        finally:
            self._wide = False

    def _layer(
        self,
        layer: Layer,
        x: Tensor,
        bias: Tensor | None,
        compute: Callable[[Tensor], Tensor],
    ) -> Tensor:
        start = time.perf_counter()
        product = None
        if layer.operation is not None and not wants_gradient(x):
            product = self._product(layer.operation, None)
        if product is not None:
            self._tell()
            y = _run(product, x, bias, layer)
            if y is not None:
                self.engine.note(product.backend, time.perf_counter() - start)
                return y
        x = self.quantize_input(as_real(x))
        y = compute(x)
        if self.listen is not None:
            y = self.listen(x, y, compute, None)
        self.engine.note(FLOAT, time.perf_counter() - start)
        return y

    def reads(self, operation: Operation | None) -> Reader | None:
        """Return what makes the integers that a layer's kernel takes; None where it has none."""
        self.use()
        product = None if operation is None else self._product(operation, None)
        return product.reads if is_chainable(product) else None

    def as_read(self, operation: Operation | None, x: Tensor) -> Tensor:
        """Return ``x`` as a layer that alone is read by this one would hand it on."""
        product = None if operation is None else self._product(operation, None)
        if not is_chainable(product) or product.reads is None:
            return x
        q = product.stored(x)
        return x if q is None else LayerOutput.of(q, q, product.reads, lambda *_: x, x.stride())

    def linear(self, *parts: Rows) -> tuple[Multiply, ...]:
        """Return the products with the weight, a matrix: with each of some of its rows."""
        self._tell()
        return tuple(functools.partial(self._multiply, self._product(LINEAR, r), r) for r in parts)

    def _multiply(
        self, product: Product | None, rows: Rows, x: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Return one product; with a lower rest in float32 where it is quantized, or ``x`` is."""
        low = self.rest
        if low is None or (x.dtype == low and not self._settled(("quantized",))):
            return self._times(product, rows, x, bias)
        bias = None if bias is None else bias.to(torch.float32)
        with self._widened(x):
            y = self._times(product, rows, x.to(torch.float32), bias)
        return y.to(low) if x.dtype == low else y

    def _times(self, product: Product | None, rows: Rows, x: Tensor, bias: Tensor | None) -> Tensor:
        start = time.perf_counter()
        if product is not None and not wants_gradient(x):
            y = product(as_real(x), bias)
            if y is not None:
                self.engine.note(product.backend, time.perf_counter() - start)
                return y
        x = self.quantize_input(x)
        y = F.linear(x, self._rows(rows), bias)
        if self.listen is not None:
            y = self.listen(x, y, lambda x: F.linear(x, self._rows(rows)), rows)
        self.engine.note(FLOAT, time.perf_counter() - start)
        return y

    def _rows(self, rows: Rows) -> Tensor:
        real = self._real()
        return real if rows is None else real[slice(*rows)]

    def _product(self, operation: Operation, rows: Rows) -> Product | None:
        """Return the kernel for one use of the weight."""
        product: Product | None = self._settled(("product", operation, rows))
        return product

    def _own_product(self, operation: Operation, rows: Rows) -> Product | None:
        """Return the kernel as it was packed; whoever observes needs the input itself."""
        if self.held is None or self.observe is not None or not self.engine.fast or recorded():
            return None
        if torch.is_autocast_enabled(self.parameter.device.type):
            return None  # the float layer computes, and gives its output, in another format
        return self.held.product(operation, self.activation, rows, self.parameter.device)


def _run(product: Product, x: Tensor, bias: Tensor | None, layer: Layer) -> Tensor | None:
    """Return the output of ``product``; what is expected to follow is computed with it.

    None where the product can't be computed.
    """
    wanted = None if layer.reader is None else layer.reader.reads()
    after = layer.after
    q = None
    if isinstance(x, LayerOutput) and is_chainable(product):
        q = x.integers(product.reads)
        if q is not None and not product.takes(q):
            q = None
    last = x.channels_last if isinstance(x, LayerOutput) else is_channels_last(x)
    if q is None:
        x = as_real(x)
    plan = layer.plan if is_adding(product) else None
    ahead = wanted is not None or isinstance(after, tuple) or plan is not None
    if not is_chainable(product) or (q is None and not ahead):
        return product(x, bias)
    known = product.stored(x) if q is None else q
    if known is None:
        return product(x, bias)
    compute = functools.partial(_real, product, bias, last)
    if plan is not None and is_adding(product):
        readers = [r for reader in plan.readers if (r := reader.reads()) is not None]
        call = Call(
            product,
            known,
            bias,
            last,
            plan.after,
            tuple(dict.fromkeys(readers)),
            plan.keeps,
            compute,
        )
        return Summand.put_off(call)
    if wanted is not None:
        clamp, gelu = (after, None) if isinstance(after, tuple) else (None, after)
        found = product.handed(known, bias, clamp, wanted, gelu)
        if found is not None:
            stride = found.stride() if last else contiguous_stride(found.shape)
            return LayerOutput.of(found, known, wanted, compute, stride, after)
    if isinstance(after, tuple):
        y = compute(known, after)
        return LayerOutput.of(y, known, None, compute, y.stride(), after)
    return compute(known, None)


def _real(
    product: Chainable, bias: Tensor | None, channels_last: bool, source: Tensor, after: After
) -> Tensor:
    """Return the real numbers of a layer's output, and of what is done with it."""
    clamp = after if isinstance(after, tuple) else None
    y = product.real(source, bias, clamp, channels_last)
    return F.gelu(y, approximate=after) if isinstance(after, str) else y
