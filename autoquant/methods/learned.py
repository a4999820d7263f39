"""What was learned of several layers together: tensors in a file beside the recipe, by digest.

The digest of a layer's tensors stands in the recipe: it is the identity of its weight, whatever
file they lie in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from autoquant.errors import SpecError, UserError
from autoquant.spec.outputs import check_target, write_bytes
from autoquant.spec.recipe import LearnedFile, Recipe

SUFFIX = ".learned.safetensors"
PARTS = ("q", "scale", "zero_point", "shift")


@dataclass(frozen=True, eq=False)
class LearnedWeight:
    """The weight of one site as it was learned, on the CPU.

    ``q`` is int8 [channels, n]; ``scale`` and ``zero_point`` are float32 [blocks, 1]; ``shift``
    [channels], float32, is what the bias moves by, of no channels where the layer can have none.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor
    shift: Tensor

    @property
    def digest(self) -> str:
        """What tells these tensors from any others."""
        found = hashlib.sha256()
        for name in PARTS:
            part: Tensor = getattr(self, name)
            found.update(f"{name}{tuple(part.shape)}{part.dtype}".encode())
            flat = part.clone(memory_format=torch.contiguous_format).flatten()
            found.update(flat.view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:32]


def learned_path(recipe: Path) -> Path:
    """Return where what was learned for a recipe lies."""
    return recipe.with_name(recipe.stem + SUFFIX)


def is_learned(path: Path) -> bool:
    """Return whether a file is one that ``write_learned`` wrote."""
    try:
        tensors = load(path.read_bytes())
        digests = {key.partition(".")[0] for key in tensors}
        return bool(digests) and all(_weight(tensors, d).digest == d for d in digests)
    except (SafetensorError, KeyError):
        return False


def write_learned(weights: Iterable[LearnedWeight], path: Path) -> LearnedFile:
    """Write weights to ``path``, whole or not at all; return what a recipe says of the file.

    Raises UserError where it can't be written, or another file is there.
    """
    check_target(path, is_learned)
    content = content_of(weights)
    write_bytes(path, content)
    return LearnedFile(str(path), hashlib.sha256(content).hexdigest())


def content_of(weights: Iterable[LearnedWeight]) -> bytes:
    """Return the file of weights: the same bytes for the same tensors."""
    tensors = {
        f"{w.digest}.{name}": getattr(w, name).contiguous() for w in weights for name in PARTS
    }
    return save(dict(sorted(tensors.items())))


def read_learned(recipe: Recipe) -> Mapping[str, LearnedWeight]:
    """Return digest → weight of what was learned for ``recipe``.

    Raises UserError, in one line, where the file is missing, cut off, or another one.
    """
    wanted = {name: site.learned for name, site in recipe.sites.items() if site.learned}
    if not wanted:
        return {}
    if recipe.learned is None:
        raise SpecError(f"{next(iter(wanted))}: learned: the recipe names no learned file")
    path = Path(recipe.learned.path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot read what the recipe learned: {error.strerror}; it lies beside the "
            "recipe where that was written"
        ) from None
    if hashlib.sha256(content).hexdigest() != recipe.learned.sha256:
        raise UserError(f"{path}: is not what the recipe learned: it was cut off, or is another's")
    try:
        tensors = load(content)
        found = {digest: _weight(tensors, digest) for digest in set(wanted.values())}
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path}: is not what the recipe learned: {error}") from None
    for name, digest in wanted.items():
        if found[digest].digest != digest:
            raise UserError(f"{path}: {name}: other tensors than the recipe says")
    return found


def _weight(tensors: Mapping[str, Tensor], digest: str) -> LearnedWeight:
    return LearnedWeight(*(tensors[f"{digest}.{name}"] for name in PARTS))


def on(device: torch.device, weight: LearnedWeight) -> LearnedWeight:
    """Return ``weight`` on a device."""
    return LearnedWeight(*(getattr(weight, name).to(device) for name in PARTS))
