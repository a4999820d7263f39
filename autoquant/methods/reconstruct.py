"""Reconstructing a quantized model layer by layer, by what its layers see of the calibration data.

The float model runs once, and what each layer sees in some places is kept. Then each layer in turn
is fitted: the model runs up to that layer, with all before it quantized as they have become, and no
further. Of n layers that takes about n/2 passes over the data, by the fast kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.errors import AutoquantError
from autoquant.methods.applier import Applier
from autoquant.methods.reconstruction.sequential import Sequential
from autoquant.nn.calibrate import count_rows, input_rows
from autoquant.nn.sites import Site
from autoquant.quant.activation import fake_quantize_activation
from autoquant.quant.blocks import to_matrix
from autoquant.spec.recipe import ActivationScheme, SiteRecipe
from autoquant.spec.techniques import CORRECTIONS, UNCORRECTED

ROW_BYTES = 2 << 30
"""Bytes of inputs of the float model that are kept, those of all layers together."""
MOST_ROWS = 1 << 15
"""Rows of one layer's input that are kept at most, or as many for each of its inputs as follow."""
ROWS_OF_AN_INPUT = 32
KINDS = ("linear", "conv", "rnn", "attention")
"""Sites whose output channels each see one input: transposed convolutions are left as they are."""

Run = Callable[[nn.Module, Any], Any]
Around = Callable[[int], contextlib.AbstractContextManager[None]]
"""What stands around each run of a model that is partly quantized, given the batch's number."""


class _Enough(AutoquantError):
    """Everything that was asked of a run has been seen."""


@dataclass
class _Seen:
    """What one site saw: rows of its input, batch by batch and call by call.

    ``rows`` are all that there were, of which each batch gives ``most``, or one for each call where
    those are more. After ``enough`` calls of a batch, what follows is not looked at.
    """

    site: Site
    module: nn.Module
    most: int
    activation: ActivationScheme | None = None
    batches: list[list[Tensor]] = field(default_factory=list)
    rows: int = 0
    enough: int | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, x: Tensor) -> None:
        if self.done:
            raise _Enough  # whoever caught it before calls again
        if x.numel():
            if self.activation is not None:
                x = fake_quantize_activation(x, self.activation, self.site.kind)
            self.rows += count_rows(x, self.site, self.module)
            self.batches[-1].append(input_rows(x, self.site, self.module, self.most))
            self._thin()
        if self.done:
            raise _Enough

    def _thin(self) -> None:
        """Keep no more of a batch than may be: the same rows for calls of the same shapes."""
        parts = self.batches[-1]
        while sum(p.shape[1] for p in parts) > self.most and any(p.shape[1] > 1 for p in parts):
            parts[:] = [part[:, ::2].clone() for part in parts]

    @property
    def done(self) -> bool:
        """Whether everything was seen that there is to see in this batch."""
        return self.enough is not None and len(self.batches[-1]) >= self.enough

    @property
    def shapes(self) -> list[list[tuple[int, ...]]]:
        """The shapes of all parts: where they are others, what was seen is of other places."""
        return [[tuple(part.shape) for part in parts] for parts in self.batches]

    def whole(self) -> Tensor:
        """Return all rows [groups, rows, n]."""
        return torch.cat([part for parts in self.batches for part in parts], 1)


def reconstruct(
    applier: Applier,
    sites: Mapping[str, SiteRecipe],
    batches: Sequence[Any],
    run: Run,
    technique: Sequential,
    progress: Callable[[str], None] = lambda _: None,
    around: Around = lambda _: contextlib.nullcontext(),
    *,
    names: Collection[str] | None = None,
    clean_batches: Sequence[Any] | None = None,
) -> dict[str, SiteRecipe]:
    """Return ``sites`` with weights that were learned one after another; the model is left so.

    ``run`` runs the model on one of ``batches``, within ``around``, which may give again what
    modules before the layer gave in an earlier run: the layer itself has no name while it is
    looked at. What was learned is in ``applier.learned``. With ``names`` those sites alone are
    fitted; ``clean_batches`` are what the float model runs on, where that is something else. Sites
    in float, those that no activation meets, and those that see other numbers of rows in the
    quantized model than in the float one (a decoder that ends elsewhere) stay as they are.
    """
    prepared = applier.prepared
    done = applier.apply(sites)
    chosen = [
        site
        for site in prepared.sites
        if done[site.name].weight is not None
        and site.activation
        and site.kind in KINDS
        and (names is None or site.name in names)
    ]
    applier.to_float()
    with prepared.in_float32():
        clean = _float_inputs(applier, chosen, clean_batches or batches, run)
    applier.apply(done)
    correction = CORRECTIONS.get("bias")()
    for site in chosen:
        progress(site.name)
        own = clean.pop(site.name)
        seen = _quantized_inputs(applier, own, done[site.name].activation, batches, run, around)
        if seen.shapes != own.shapes or not any(own.batches):
            continue
        slot = prepared.slots[site.name]
        matrix = to_matrix(slot.target.to(torch.float32), site.channel_axis)
        scheme = done[site.name].weight
        assert scheme is not None
        found = technique.fit(site, scheme, matrix, seen.whole(), own.whole(), own.rows)
        applier.learned[found.digest] = found
        done[site.name] = replace(
            done[site.name],
            correction=correction if site.corrects else UNCORRECTED,
            learned=found.digest,
        )
        applier.apply(done)
    return done


def _float_inputs(
    applier: Applier, sites: Sequence[Site], batches: Sequence[Any], run: Run
) -> dict[str, _Seen]:
    """Return what each site sees in the float model, by name."""
    prepared = applier.prepared
    budget = ROW_BYTES // (4 * max(len(sites), 1))
    found = {}
    for site in sites:
        path, _ = site.users[-1]
        inputs = site.matrix[1]
        rows = min(budget // (inputs * site.groups), max(MOST_ROWS, ROWS_OF_AN_INPUT * inputs))
        most = max(rows // max(len(batches), 1), 1)
        found[site.name] = _Seen(site, prepared.model.get_submodule(path), most)
    with _observed(applier, found):
        for batch in batches:
            for seen in found.values():
                seen.batches.append([])
            run(prepared.model, batch)
    return found


def _quantized_inputs(
    applier: Applier,
    own: _Seen,
    activation: ActivationScheme | None,
    batches: Sequence[Any],
    run: Run,
    around: Around,
) -> _Seen:
    """Return what a site sees with the model as it is, in the places where ``own`` saw it."""
    seen = _Seen(own.site, own.module, own.most, activation)
    with _observed(applier, {own.site.name: seen}):
        for number, (batch, parts) in enumerate(zip(batches, own.batches, strict=True)):
            seen.batches.append([])
            if not parts:
                continue
            seen.enough = len(parts)
            try:
                with around(number):
                    run(applier.prepared.model, batch)
            except Exception:  # ours, or what the user's code made of it
                if not seen.done:
                    raise
    return seen


@contextlib.contextmanager
def _observed(applier: Applier, listeners: Mapping[str, _Seen]) -> Iterator[None]:
    """Let sites tell ``listeners`` what they see.

    Their choices have no names meanwhile: what is known by names would be given without a look.
    """
    slots = applier.prepared.slots
    names = {name: slots[name].choice for name in listeners}
    for name, listener in listeners.items():
        slots[name].observe, slots[name].choice = listener, None
    try:
        with torch.no_grad():
            yield
    finally:
        for name, choice in names.items():
            slots[name].observe, slots[name].choice = None, choice
