"""recipe.yaml: a recipe as a file that a person can read, review and edit."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from autoquant.errors import SpecError
from autoquant.spec.documents import (
    Fields,
    is_one_of,
    label,
    parse_yaml,
    read_yaml,
    show,
)
from autoquant.spec.evidence_file import evidence_to_plain, take_evidence
from autoquant.spec.outputs import check_target, is_signed, signed, write_text
from autoquant.spec.recipe import (
    FLOAT32,
    READABLE,
    RESTS,
    VERSION,
    LearnedFile,
    ModelIdentity,
    Recipe,
)
from autoquant.spec.site_file import site_from_plain, site_to_plain
from autoquant.spec.techniques import (
    RECONSTRUCTIONS,
    technique_of,
)

OLDER = "smoothing"
"""What transforms were called when there was one kind."""


def load(path: Path) -> Recipe:
    """Return the recipe in ``path``; SpecError names file, layer, field, found and allowed."""
    recipe = _recipe(read_yaml(path, "recipe"), str(path))
    if recipe.learned is None:
        return recipe
    beside = replace(recipe.learned, path=os.path.abspath(path.parent / recipe.learned.path))
    return replace(recipe, learned=beside)


def loads(text: str, where: str = "recipe") -> Recipe:
    """Return the recipe in ``text``."""
    return _recipe(parse_yaml(text, "recipe", where), where)


def _recipe(data: dict[str, Any], where: str) -> Recipe:
    fields = Fields(data, where)
    if "autoquant_recipe" not in fields:
        raise SpecError(f"{where}: not a recipe: it has no autoquant_recipe field")
    version = fields.take("autoquant_recipe")
    if not is_one_of(version, READABLE):
        raise SpecError(
            f"{where}: autoquant_recipe: found version {show(version)}, this release reads "
            f"{' and '.join(map(str, READABLE))}; use the release that wrote it"
        )
    model = fields.take("model", None)
    evidence = take_evidence(fields)
    seed = fields.integer("seed", 0, low=0)
    folded = _texts(fields, "folded", "names of BatchNorm layers and of the layers before")
    transforms = _transforms(fields)
    rest = fields.take("rest", FLOAT32)
    if not is_one_of(rest, RESTS):
        raise fields.fail("rest", rest, " or ".join(RESTS))
    layers = fields.take("layers")
    reconstruction = None
    if "reconstruction" in fields:
        reconstruction = technique_of(RECONSTRUCTIONS, fields.take("reconstruction"), where)
    learned = _learned_file(fields.take("learned", None), f"{where}: learned")
    fields.close()
    if not isinstance(layers, dict) or not layers:
        raise fields.fail("layers", layers, "one entry or more")
    sites = {}
    for name, site in layers.items():
        if not isinstance(name, str):
            raise SpecError(f"{where}: layers: {show(name)} is not a layer name; put it in quotes")
        sites[name] = site_from_plain(site, f"{where}: {label(name)}")
    lost = [name for name, site in sites.items() if site.learned and learned is None]
    if lost:
        raise SpecError(f"{where}: {label(lost[0])}: learned: the recipe names no learned file")
    for name in transforms:
        if name not in sites:
            raise SpecError(f"{where}: transforms: {label(name)} is not among the layers")
    identity = _model(model, where)
    return Recipe(
        sites, identity, evidence, folded, seed, reconstruction, learned, transforms, rest
    )


def _transforms(fields: Fields) -> dict[str, str]:
    """Return the transforms of inputs; recipes of before there were others call them smoothing."""
    allowed = "names of layers, and hadamard_N or a letter for each channel"
    given = [name for name in ("transforms", OLDER) if name in fields]
    if len(given) > 1:
        raise SpecError(f"{fields.where}: transforms are given twice; {OLDER} says them too")
    return _texts(fields, given[0], allowed) if given else {}


def _texts(fields: Fields, name: str, allowed: str) -> dict[str, str]:
    found = fields.take(name, None) or {}
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, str) for k, v in found.items()
    ):
        raise fields.fail(name, found, allowed)
    return found


def _learned_file(data: Any, where: str) -> LearnedFile | None:
    if data is None:
        return None
    fields = Fields(data, where)
    file, digest = fields.text("file"), fields.text("sha256")
    fields.close()
    # A recipe from a stranger names no file but one that lies beside it.
    if Path(file).name != file or file in ("", ".", ".."):
        raise fields.fail("file", file, "the name of a file beside the recipe")
    return LearnedFile(file, digest)


def _model(data: Any, where: str) -> ModelIdentity | None:
    if data is None:
        return None
    fields = Fields(data, f"{where}: model")
    identity = ModelIdentity(fields.text("name"), fields.text("sha256"))
    fields.close()
    return identity


def dumps(recipe: Recipe) -> str:
    """Return ``recipe`` as YAML."""
    head: dict[str, Any] = {"autoquant_recipe": VERSION}
    if recipe.model is not None:
        head["model"] = {"name": recipe.model.name, "sha256": recipe.model.sha256}
    if recipe.evidence is not None:
        head |= evidence_to_plain(recipe.evidence)
    head["seed"] = recipe.seed
    if recipe.rest != FLOAT32:
        head["rest"] = recipe.rest
    if recipe.folded:
        head["folded"] = dict(recipe.folded)
    if recipe.reconstruction is not None:
        head["reconstruction"] = recipe.reconstruction.plain()
    if recipe.learned is not None:
        file = Path(recipe.learned.path).name
        head["learned"] = {"file": file, "sha256": recipe.learned.sha256}
    text = yaml.dump(head, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    layers = {name: site_to_plain(site) for name, site in recipe.sites.items()}
    transforms = {}
    if recipe.transforms:
        transforms["transforms"] = dict(recipe.transforms)
    return text + yaml.dump(
        {"layers": layers, **transforms},
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=200,
    )


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Writes each scheme on one line, and everything else as a block."""


def _represent(dumper: yaml.SafeDumper, data: dict[str, Any]) -> yaml.Node:
    node = dumper.represent_mapping("tag:yaml.org,2002:map", data.items())
    node.flow_style = any(key in data for key in ("bits", "samples", "method"))
    return node


_Dumper.add_representer(dict, _represent)


def save(recipe: Recipe, path: Path) -> None:
    """Write ``recipe`` to ``path``, whole or not at all.

    The learned file that it names is written before, beside it, by whoever learned.

    Raises UserError where it can't be written, or a file is there that is not a recipe as this
    function wrote it.
    """
    check_target(path, is_signed)
    write_text(path, signed(dumps(recipe)))
