"""The safe archive of a quantized model: packed integers and the recipe, in one safetensors file.

Nothing in it is code, so loading one from a stranger runs nothing. The architecture comes from the
user's own float model.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autoquant.errors import ModelFileError, SpecError
from autoquant.nn.convert import deploy, prepare
from autoquant.nn.sites import Site
from autoquant.quant.affine import QParams
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.granularity import block_size
from autoquant.spec.recipe import Recipe, SiteRecipe
from autoquant.spec.recipe_file import dumps, loads

RECIPE_KEY = "autoquant_recipe"
SUFFIX = ".safetensors"


def save_archive(module: nn.Module, recipe: Recipe, path: Path) -> None:
    """Write a deployed ``module`` and its calibrated ``recipe``; ModelFileError where it fails."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(module), str(temporary), metadata={RECIPE_KEY: dumps(recipe)})
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
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in once.values()
    }


def read_recipe(path: Path) -> Recipe:
    """Return the recipe inside an archive; ModelFileError where the file is none."""
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{path}: cannot read: {error}") from error
    if RECIPE_KEY not in metadata:
        raise ModelFileError(f"{path}: holds no recipe; was it written by `autoquant apply`?")
    return loads(metadata[RECIPE_KEY], str(path))


def load_archive(path: Path, model: nn.Module) -> nn.Module:
    """Return the quantized model in ``path``; ``model`` is the float architecture, changed.

    Its weights may be anything: all that the archive holds replaces them, on the device that they
    are on. Raises ModelFileError where it is another architecture.
    """
    recipe = read_recipe(path)
    other = f"{path}: is of another architecture"
    try:
        prepared = prepare(model.eval(), folded=recipe.folded)
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
        name: torch.zeros(known[name].matrix[0], device=devices[name])
        for name, site in recipe.sites.items()
        if site.bias_correction
    }
    deployed = deploy(prepared, choices, shifts)
    with safe_open(str(path), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    everything = deployed.state_dict(keep_vars=True)
    expected = {key: value for key, value in everything.items() if isinstance(value, Tensor)}
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
    empty = next((key for key, value in expected.items() if value.is_meta), None)
    if empty is not None:
        raise ModelFileError(
            f"{path}: the given model has no memory for {empty!r}: it is on the device meta; give "
            "model.to_empty(device='cpu')"
        )
    deployed.load_state_dict(tensors, strict=False)
    return deployed


def _empty(site: Site, recipe: SiteRecipe, device: torch.device) -> QuantizedWeight | None:
    """Return a quantized weight of the right shapes on ``device``, to be filled."""
    scheme = recipe.weight
    if scheme is None:
        return None
    rows, columns = site.matrix
    blocks = rows * columns // math.prod(block_size(scheme.granularity, site.matrix))
    scale, zero_point = torch.ones(blocks, 1, device=device), torch.zeros(blocks, 1, device=device)
    qparams = QParams(scale, zero_point, scheme.bits, scheme.symmetric)
    q = torch.zeros(rows, columns, dtype=torch.int8, device=device)
    return QuantizedWeight(q, qparams, scheme, site.shape, site.channel_axis)
