"""The safe archive of a quantized model: packed integers and the recipe, in one safetensors file.

Nothing in it is code, so loading one from a stranger runs nothing. The architecture comes from the
user's own float model.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import nn

from autoquant.errors import ModelFileError
from autoquant.nn.convert import deploy, prepare
from autoquant.nn.sites import Site
from autoquant.nn.weights import QuantizedWeight
from autoquant.quant.affine import QParams
from autoquant.spec.granularity import block_size
from autoquant.spec.recipe import FLOAT_SITE, Recipe, SiteRecipe, WeightScheme
from autoquant.spec.recipe_file import dumps, loads

RECIPE_KEY = "autoquant_recipe"
SUFFIX = ".safetensors"


def save_archive(module: nn.Module, recipe: Recipe, path: Path) -> None:
    """Write a deployed ``module`` and its calibrated ``recipe``; ModelFileError where it fails."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(module, str(temporary), metadata={RECIPE_KEY: dumps(recipe)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ModelFileError(f"{path}: cannot write: {error}") from error


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

    Its weights may be anything: all that the archive holds replaces them. Raises ModelFileError
    where it is another architecture.
    """
    recipe = read_recipe(path)
    prepared = prepare(model.eval(), folded=recipe.folded)
    known = {site.name: site for site in prepared.sites}
    missing = [name for name in recipe.sites if name not in known]
    if missing:
        raise ModelFileError(f"{path}: is of another architecture: no layer {missing[0]!r} here")
    choices = {}
    for name, site in recipe.sites.items():
        choices[name] = (_empty(known[name], site), site.activation)
    deployed = deploy(prepared, choices)
    tensors = {}
    with safe_open(str(path), "pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensors[key] = file.get_tensor(key)
    absent, unexpected = deployed.load_state_dict(tensors, strict=False)
    # A tensor that several layers share is stored once, under one of its names.
    aliases = _aliases(deployed)
    absent = [k for k in absent if not any(a in tensors for a in aliases.get(k, ()))]
    if absent or unexpected:
        name = (absent or unexpected)[0]
        raise ModelFileError(f"{path}: is of another architecture: {name!r} does not fit")
    return deployed


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    groups: dict[int, list[str]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(key)
    return {key: keys for keys in groups.values() for key in keys}


def _empty(site: Site, recipe: SiteRecipe = FLOAT_SITE) -> QuantizedWeight | None:
    """Return a quantized weight of the right shapes, to be filled."""
    scheme: WeightScheme | None = recipe.weight
    if scheme is None:
        return None
    rows, columns = site.matrix
    blocks = rows * columns // math.prod(block_size(scheme.granularity, site.matrix))
    qparams = QParams(torch.ones(blocks, 1), torch.zeros(blocks, 1), scheme.bits, scheme.symmetric)
    q = torch.zeros(rows, columns, dtype=torch.int8)
    return QuantizedWeight(q, qparams, scheme, site.shape, site.channel_axis)
