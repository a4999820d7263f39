"""The safe archive of a quantized model: packed integers and the recipe, in one safetensors file.

Nothing in it is code, so loading one from a stranger runs nothing. The architecture comes from the
user's own float model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autoquant.errors import ModelFileError, SpecError
from autoquant.nn.convert import deploy, prepare, use_channels_last, uses_channels_last
from autoquant.nn.fold import without_norms
from autoquant.nn.intake import take
from autoquant.nn.sites import Site
from autoquant.nn.transforms import transform_as
from autoquant.quant.affine import QParams
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.granularity import block_size
from autoquant.spec.recipe import Recipe, SiteRecipe
from autoquant.spec.recipe_file import dumps, loads
from autoquant.spec.techniques import UNCORRECTED

RECIPE_KEY = "autoquant_recipe"
LAYOUT_KEY = "autoquant_layout"
"""Whether 2-d convolutions compute in channels-last memory, where sums round otherwise."""
CHANNELS_LAST = "channels_last"
SUFFIX = ".safetensors"


def save_archive(module: nn.Module, recipe: Recipe, path: Path) -> None:
    """Write a deployed ``module`` and its calibrated ``recipe``; ModelFileError where it fails."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {RECIPE_KEY: dumps(recipe)}
        if uses_channels_last(module):
            metadata[LAYOUT_KEY] = CHANNELS_LAST
        with without_norms(module):
            save_file(_tensors(module), str(temporary), metadata=metadata)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ModelFileError(f"{path}: cannot write: {error}") from error


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module, each once and with memory of its own."""
    once: dict[int, tuple[str, Tensor]] = {}
    for key, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):  # the architecture brings what else a module keeps
            once.setdefault(id(value), (key, value))
    return {
        name: part.clone(memory_format=torch.contiguous_format)
        for key, value in once.values()
        for name, part in _parts(key, value.detach())
    }


def is_archive(path: Path) -> bool:
    """Return whether ``save_archive`` wrote the file."""
    try:
        with safe_open(str(path), "pt") as file:
            return RECIPE_KEY in (file.metadata() or {})
    except SafetensorError:
        return False


INDICES, VALUES = "@indices", "@values"
"""Ends of the names of a sparse tensor's two parts."""


def _parts(key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the dense tensors that stand for ``value``: itself, or indices and values."""
    if value.layout is torch.strided:
        yield key, value
        return
    coordinates = value.to_sparse_coo().coalesce()
    yield key + INDICES, coordinates.indices()
    yield key + VALUES, coordinates.values()


def _whole(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors`` with the parts of sparse ones put together, in the shapes expected."""
    found = {key: value for key, value in tensors.items() if not key.endswith((INDICES, VALUES))}
    for key, like in expected.items():
        if key + INDICES in tensors and key + VALUES in tensors:
            coordinates = torch.sparse_coo_tensor(
                tensors[key + INDICES], tensors[key + VALUES], like.shape, check_invariants=True
            )
            found[key] = coordinates.coalesce().to_sparse(layout=like.layout)
    return found


def read_recipe(path: Path) -> Recipe:
    """Return the recipe inside an archive; ModelFileError where the file is none."""
    return loads(_metadata(path)[RECIPE_KEY], str(path))


def _metadata(path: Path) -> dict[str, str]:
    """Return the texts inside an archive; ModelFileError where the file is none."""
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{path}: cannot read: {error}") from error
    if RECIPE_KEY not in metadata:
        raise ModelFileError(f"{path}: holds no recipe; was it written by `autoquant apply`?")
    return metadata


def load_archive(path: Path, model: nn.Module) -> nn.Module:
    """Return the quantized model in ``path``; ``model`` is the float architecture, changed.

    Its weights may be anything: all that the archive holds replaces them, on the device that they
    are on. Raises ModelFileError where it is another architecture.
    """
    recipe = read_recipe(path)
    other = f"{path}: is of another architecture"
    model = take(model)
    model.eval()
    try:
        prepared = prepare(model, folded=recipe.folded).lowered(recipe.rest)
        transform_as(prepared, recipe.transforms)
        known = {site.name: site for site in prepared.sites}
        missing = [name for name in recipe.sites if name not in known]
        if missing:
            raise ModelFileError(f"no layer {missing[0]!r} here")
        devices = {name: prepared.slots[name].parameter.device for name in recipe.sites}
        choices = {
            name: (_empty(known[name], site, devices[name]), site.activation)
            for name, site in recipe.sites.items()
        }
    except (ModelFileError, SpecError) as error:
        raise ModelFileError(f"{other}: {error}") from error
    shifts = {
        name: torch.zeros(known[name].matrix[0], dtype=torch.float32, device=devices[name])
        for name, site in recipe.sites.items()
        if site.correction != UNCORRECTED
    }
    deployed = deploy(prepared, choices, shifts)
    with safe_open(str(path), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with without_norms(deployed):
        everything = deployed.state_dict(keep_vars=True)
    expected = {key: value for key, value in everything.items() if isinstance(value, Tensor)}
    try:
        tensors = _whole(tensors, expected)
    except RuntimeError as error:
        raise ModelFileError(f"{other}: {' '.join(str(error).split())}") from error
    for key, tensor in tensors.items():
        if key not in expected:
            raise ModelFileError(f"{other}: no {key!r} here")
        if tensor.shape != expected[key].shape:
            here, found = tuple(expected[key].shape), tuple(tensor.shape)
            raise ModelFileError(f"{other}: {key!r} is {found}, here it is {here}")
    # A tensor that several layers share is stored once, under one of its names.
    stored = {id(expected[key]) for key in tensors}
    absent = [key for key, value in expected.items() if id(value) not in stored]
    if absent:
        raise ModelFileError(f"{other}: {absent[0]!r} is not in it")
    try:
        deployed.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # such as a compressed sparse tensor of another count
        raise ModelFileError(f"{other}: {' '.join(str(error).split())}") from error
    if _metadata(path).get(LAYOUT_KEY) == CHANNELS_LAST:
        use_channels_last(deployed)
    return deployed


def _empty(site: Site, recipe: SiteRecipe, device: torch.device) -> QuantizedWeight | None:
    """Return a quantized weight of the right shapes on ``device``, to be filled."""
    scheme = recipe.weight
    if scheme is None:
        return None
    rows, columns = site.matrix
    blocks = rows * columns // math.prod(block_size(scheme.granularity, site.matrix))
    scale = torch.ones(blocks, 1, dtype=torch.float32, device=device)
    zero_point = torch.zeros_like(scale)
    qparams = QParams(scale, zero_point, scheme.bits, scheme.symmetric)
    q = torch.zeros(rows, columns, dtype=torch.int8, device=device)
    return QuantizedWeight(q, qparams, scheme, site.shape, site.channel_axis)
