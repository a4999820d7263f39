"""The fast kernels are held against the reference on this model, layer by layer.

Every candidate is measured by them, and only what is reported at the end by the reference: a
kernel that is wrong on this machine, or on weights that lie as these do, would have a search go by
wrong numbers. So each layer's product is computed both ways on its real input of a few samples,
in each format of weight and activation that the space offers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from autoquant.errors import TrialError, UserError
from autoquant.kernels.gpu.doubt import collecting
from autoquant.kernels.operation import (
    LINEAR,
    Operation,
    Product,
    Reader,
    SchemeReader,
    is_chainable,
)
from autoquant.kernels.reference import multiply, reference
from autoquant.nn.converted import Converted, converted_modules
from autoquant.nn.layer_output import After
from autoquant.quant.activation import fake_quantize_activation
from autoquant.quant.affine import QParams, dequantize
from autoquant.quant.rotation import Rotation
from autoquant.quant.weight import QuantizedWeight
from autoquant.session.session import Session
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.space import SiteSpace
from autoquant.spec.techniques import NEAREST
from autoquant.spec.uniform import baselines

TOLERANCE = 1e-5
"""Largest difference, relative to the sum of the magnitudes that were added up."""
FLIPS = 0.02
"""Share of the integers handed to the next layer that may differ by one: those next to the middle
between two."""

Formats = tuple[tuple[int, str, str] | None, tuple[int, str, str] | None]


def check_kernels(session: Session, spaces: Mapping[str, SiteSpace]) -> None:
    """Raise UserError, naming the layer, where a fast kernel is not the reference's equal."""
    if not session.prepared.engine.backends:
        return
    recipes: dict[str, dict[Formats, SiteRecipe]] = {}
    for sites in baselines(spaces):
        for name, recipe in sites.items():
            if recipe.weight is not None and recipe.activation is not None:
                recipes.setdefault(name, {}).setdefault(
                    (_format(recipe.weight), _format(recipe.activation)), recipe
                )
    session.applier.to_float()
    layers = {
        id(slot): (layer, name)
        for layer in converted_modules(session.model)
        for name, slot in layer.sites.items()
    }
    for name, found in recipes.items():
        slot = session.prepared.slots[name]
        layer, weight = layers[id(slot)]
        slot.observe = _Once(functools.partial(_check, session, layer, weight, name, found))
    # An accelerator's kernels are tuned for the shapes they meet: a whole batch has those of the
    # trials. On a CPU a few samples are enough, and cheaper.
    evaluator, on_cpu = session.evaluator, session.device.type == "cpu"
    inputs = evaluator.few(session.model) if on_cpu else evaluator.example()
    try:
        evaluator.observe(session.model, inputs)
    except TrialError as error:
        raise UserError(f"the fast kernels can't be checked: {error}") from error
    finally:
        for slot in session.prepared.slots.values():
            slot.observe = None


class _Once:
    """Calls ``check`` with the first input that has any number."""

    def __init__(self, check: functools.partial[None]) -> None:
        self.check = check
        self.done = False

    def __call__(self, x: Tensor) -> None:
        if not self.done and x.numel():
            self.done = True
            self.check(x.detach())


def _format(scheme: WeightScheme | ActivationScheme) -> tuple[int, str, str]:
    return scheme.bits, scheme.granularity, scheme.scheme


def _check(
    session: Session,
    layer: Converted,
    weight: str,
    name: str,
    recipes: Mapping[Formats, SiteRecipe],
    x: Tensor,
) -> None:
    """Compare the kernel with the reference on the input ``x`` of one layer, in each format."""
    operation = layer.operation if weight == "weight" else LINEAR
    if operation is None:
        return
    own = dict.get(layer.module._parameters, "bias") if weight == "weight" else None
    engine = session.prepared.engine
    for recipe in recipes.values():
        # How weights are rounded changes their integers, and not what is done with them.
        done = session.applier.calibrated(name, _plainly_rounded(recipe))
        held = session.applier.held(name, done)
        if held is None or done.activation is None:
            continue
        product = held.product(operation, done.activation, None, x.device)
        if product is None:
            continue
        stored = held.quantized.as_matrix() if operation == LINEAR else held.quantized
        bias = held.bias(own)
        bias = None if bias is None else bias.to(x.dtype)
        given = x if held.transform is None else held.transform.input_back(x)
        if isinstance(held.transform, Rotation):
            # Its sums round in another order, so integers next to the middle go to either side.
            rotated, given = product, x
            product = engine.prepare(operation, stored, done.activation, x.device)
            assert product is not None
            _check_rotated(rotated, product, held.transform, x, name)
        outputs = _outputs(product, given, bias)
        if not outputs:
            continue
        exact, moved = x, bias
        if x.device.type != "cpu":  # cuDNN's float32 may be no more exact than the kernel
            exact, moved = x.double(), None if bias is None else bias.double()
        expected = reference(operation, exact, stored, done.activation, moved)
        wrongs = (
            _differs(operation, exact, stored, done.activation, moved, expected, found)
            for found in outputs
        )
        wrong = next((w for w in wrongs if w is not None), None)
        if wrong is None and layer.reader is not None:
            wrong = _differs_handed(session, layer, product, given, bias, expected.to(x.dtype))
        if wrong is not None:
            raise UserError(
                f"{name}: the fast kernel ({product.backend}) and the reference differ on this "
                f"machine, {wrong}, with {_words(done)}: search with --backend reference"
            )


def _outputs(product: Product, x: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Return what a product gives: of numbers, and where it may store them first, of integers."""
    found = product(x, bias)
    if found is None or not is_chainable(product) or isinstance(product.reads, SchemeReader):
        return [] if found is None else [found]
    flag = _flag(x)
    with collecting(flag):
        chained = product(x, bias)
    return [found] if chained is None or flag.item() else [found, chained]


def _flag(x: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=x.device)


def _differs(
    operation: Operation,
    x: Tensor,
    weight: QuantizedWeight,
    activation: ActivationScheme,
    bias: Tensor | None,
    expected: Tensor,
    found: Tensor,
) -> str | None:
    """Return in words how two outputs differ beyond rounding, None where they don't."""
    if expected.shape != found.shape:
        return f"in shape: {list(found.shape)} and {list(expected.shape)}"
    kind = "conv" if operation.kind.startswith("conv") else "linear"
    size = fake_quantize_activation(x, activation, kind).abs()
    real = weight.dequantize(x.dtype).abs()
    added = multiply(operation, size, real, None if bias is None else bias.to(x.dtype).abs())
    tolerance = max(TOLERANCE, 4 * torch.finfo(found.dtype).eps)
    off = (found.double() - expected.double()).abs()
    allowed = tolerance * added.double()
    if bool((off <= allowed + torch.finfo(torch.float32).tiny).all()):
        return None
    worst = int((off - allowed).nan_to_num(torch.inf).argmax())
    right = float(expected.flatten()[worst])
    return f"by {float(off.flatten()[worst]):.3g} where {right:.3g} is right"


def _differs_handed(
    session: Session,
    layer: Converted,
    product: Product,
    x: Tensor,
    bias: Tensor | None,
    expected: Tensor,
) -> str | None:
    """Return how the integers that are handed to the next layer differ from the reference's."""
    reader = layer.reader
    assert reader is not None
    site = next(s for s in session.prepared.sites if (reader.path, "weight") in s.users)
    scheme = session.applier.activation(site.name, ActivationScheme(8))
    if not is_chainable(product) or product.reads is None:
        return None
    after = layer.after
    clamp, gelu = (after, None) if isinstance(after, tuple) else (None, after)
    transform = session.prepared.slots[site.name].transform
    if isinstance(transform, Rotation):  # which is handed nothing
        return None
    to: Reader | None = SchemeReader(scheme, transform)
    if not isinstance(product.reads, SchemeReader):  # another backend's: its own
        to = _reads(session, site.name, reader.operation, scheme)
    flag = _flag(x)
    with collecting(flag):
        known = product.stored(x)
        if known is None or to is None:
            return None
        found = product.handed(known, bias, clamp, to, gelu)
    if found is None or flag.item():
        return None
    real = _done(expected, after)
    real = real if transform is None else transform.of_input(real)
    right = fake_quantize_activation(real, scheme, site.kind)
    assert scheme.scale is not None
    scale, zero_point = (
        torch.tensor(n, dtype=torch.float32) for n in (scheme.scale, scheme.zero_point or 0)
    )
    numbers = QParams(scale, zero_point, scheme.bits)
    offset = 128 if found.dtype == torch.uint8 else 0
    got = dequantize(found.to(torch.int16) - offset, numbers)
    share = _share_that_differs((got - right).abs() / scheme.scale)
    if share is None:
        return None
    return f"in {share:.1%} of the integers that it hands to {site.name}"


def _reads(
    session: Session, name: str, operation: Operation | None, scheme: ActivationScheme
) -> Reader | None:
    """Return what a site's layer makes integers by; None where it takes none."""
    held = session.applier.held(name, SiteRecipe(WeightScheme(8), scheme))
    if held is None or operation is None:
        return None
    product = held.product(operation, scheme, None, session.device)
    return product.reads if is_chainable(product) else None


def _share_that_differs(steps: Tensor) -> float | None:
    """Return the share of integers that differ, by so many steps; None for a few next to ties."""
    steps = steps.round()
    share = float((steps > 0).float().mean())
    return None if float(steps.max()) <= 1 and share <= FLIPS else share


def _check_rotated(
    rotated: Product, plain: Product, rotation: Rotation, x: Tensor, name: str
) -> None:
    """Raise UserError where a kernel doesn't make the integers of H·x, which is ``x``."""
    if not (is_chainable(rotated) and is_chainable(plain)):
        return
    found, right = rotated.stored(rotation.input_back(x)), plain.stored(x)
    if found is None or right is None:
        return
    share = _share_that_differs((found.float() - right.float()).abs())
    if share is not None:
        raise UserError(
            f"{name}: the fast kernel ({rotated.backend}) and the reference differ on this "
            f"machine, in {share:.1%} of the integers of its input, {rotation.kind}: search with "
            "--backend reference"
        )


def _done(y: Tensor, after: After) -> Tensor:
    if isinstance(after, tuple):
        return y.clamp(*after)
    return y if after is None else F.gelu(y, approximate=after)


def _words(recipe: SiteRecipe) -> str:
    assert recipe.weight is not None
    assert recipe.activation is not None
    w, a = recipe.weight, recipe.activation
    return (
        f"weights of {w.bits} bits {w.granularity} {w.scheme} and activations of {a.bits} bits "
        f"{a.granularity} {a.scheme}"
    )


def _plainly_rounded(recipe: SiteRecipe) -> SiteRecipe:
    """Return ``recipe`` with its weight rounded to the nearest, which takes no time."""
    weight = recipe.weight
    return recipe if weight is None else replace(recipe, weight=replace(weight, rounding=NEAREST))
