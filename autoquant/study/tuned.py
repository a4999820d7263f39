"""Tuned trials: candidates whose layers were fitted to each other, and what they learned.

A tuned trial has the parameters of the recipe that it was made from. What was learned lies in a
file beside the study that is named by its own digest, so that whoever resumes, joins or exports the
study finds the very tensors that were measured. Samplers are not shown tuned trials: what they
measured is not what their parameters alone give.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from autoquant.errors import StudyError
from autoquant.spec.documents import Fields
from autoquant.spec.outputs import check_target, write_bytes
from autoquant.spec.recipe import LearnedFile, Recipe, SiteRecipe
from autoquant.spec.techniques import (
    CORRECTIONS,
    RECONSTRUCTIONS,
    UNCORRECTED,
    Reconstruction,
    technique_of,
)
from autoquant.study.parameters import ParameterMap
from autoquant.study.storage import FOLDER, Storage
from autoquant.study.trials import SCALES, with_scales

if TYPE_CHECKING:
    from autoquant.methods.learned import LearnedWeight

TUNED = "tuned"
"""User attribute of a tuned trial: how it was tuned, and what was learned."""


@dataclass(frozen=True)
class Tuning:
    """How a trial was tuned.

    ``sha256`` is of the file of what was learned, "" where it failed. ``learned`` maps a site to
    the digest of its tensors, ``corrected`` names those of them whose bias moved.
    """

    technique: Reconstruction
    sha256: str = ""
    learned: Mapping[str, str] = field(default_factory=dict)
    corrected: frozenset[str] = frozenset()

    @classmethod
    def of(cls, technique: Reconstruction, sha256: str, sites: Mapping[str, SiteRecipe]) -> Tuning:
        """Return how ``sites`` were tuned."""
        learned = {name: site.learned for name, site in sites.items() if site.learned}
        corrected = (name for name in learned if sites[name].correction != UNCORRECTED)
        return cls(technique, sha256, learned, frozenset(corrected))

    def sites(self, plain: Mapping[str, SiteRecipe]) -> dict[str, SiteRecipe]:
        """Return what the trial measured, from what its parameters stand for."""
        done, bias = dict(plain), CORRECTIONS.get("bias")()
        for name, digest in self.learned.items():
            correction = bias if name in self.corrected else UNCORRECTED
            done[name] = replace(done[name], correction=correction, learned=digest)
        return done

    def plain(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {
            "technique": self.technique.plain(),
            "sha256": self.sha256,
            "learned": dict(self.learned),
            "corrected": sorted(self.corrected),
        }

    @classmethod
    def read(cls, plain: Any, where: str) -> Tuning:
        """Return what ``plain`` wrote; SpecError names a field that is damaged."""
        fields = Fields(plain, where)
        technique = technique_of(RECONSTRUCTIONS, fields.take("technique"), where)
        learned, corrected = fields.take("learned"), fields.take("corrected")
        if not isinstance(learned, Mapping) or not isinstance(corrected, Sequence):
            raise fields.fail("learned", learned, "layers and digests")
        return cls(technique, fields.text("sha256"), dict(learned), frozenset(corrected))


def tuning_of(trial: FrozenTrial) -> Tuning | None:
    """Return how a trial was tuned, None where it was not."""
    plain = trial.user_attrs.get(TUNED)
    return None if plain is None else Tuning.read(plain, f"trial {trial.number}: tuned")


def searched(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that are what their parameters say."""
    return [trial for trial in trials if TUNED not in trial.user_attrs]


def sites_of(trial: FrozenTrial, mapping: ParameterMap) -> dict[str, SiteRecipe]:
    """Return the recipe that a trial measured."""
    sites, tuning = mapping.decode(trial.params), tuning_of(trial)
    if tuning is None:
        return sites
    return with_scales(tuning.sites(sites), trial.user_attrs.get(SCALES, {}))


@dataclass(frozen=True)
class Shelf:
    """Where a study keeps what its tuned trials learned: a folder of files named by their sha256.

    It lies beside the journal or the database, or in the folder ``.autoquant`` for a database that
    is no file.
    """

    folder: Path

    @classmethod
    def of(cls, storage: Storage, study: str) -> Shelf:
        """Return the shelf of a study."""
        if storage.path is None:
            return cls((FOLDER / f"{study}.learned").absolute())
        if storage.shared:
            return cls(storage.path.with_name(f"{storage.path.name}.{study}.learned"))
        return cls(storage.path / f"{study}.learned")

    def path(self, sha256: str) -> Path:
        """Return the file of that digest."""
        return self.folder / f"{sha256}.safetensors"

    def put(self, weights: Iterable[LearnedWeight]) -> str:
        """Write what was learned; return its sha256. UserError where it can't be written."""
        from autoquant.methods.learned import content_of

        content = content_of(weights)
        sha256 = hashlib.sha256(content).hexdigest()
        if not self._sound(sha256):
            write_bytes(self.path(sha256), content)
        return sha256

    def file(self, sha256: str) -> LearnedFile:
        """Return the file of that digest as a recipe names it; StudyError where it is not sound."""
        path = self.path(sha256)
        if not self._sound(sha256):
            state = "is damaged" if path.exists() else "is gone"
            raise StudyError(
                f"{path}: what a tuned trial learned {state}; it lies beside the study"
            )
        return LearnedFile(str(path), sha256)

    def _sound(self, sha256: str) -> bool:
        try:
            return hashlib.sha256(self.path(sha256).read_bytes()).hexdigest() == sha256
        except OSError:
            return False


def take_along(recipe: Recipe, path: Path) -> Recipe:
    """Copy the learned file of a recipe to beside ``path``, where the recipe is to be written.

    Return the recipe that names it there. UserError where it can't be read or written, or where
    something else lies there.
    """
    if recipe.learned is None:
        return recipe
    from autoquant.methods.learned import is_learned, learned_path, read_learned

    target = learned_path(path)
    if Path(recipe.learned.path) == target:
        return recipe
    read_learned(recipe)  # all that it says is there, or one line
    check_target(target, is_learned)
    write_bytes(target, Path(recipe.learned.path).read_bytes())
    return replace(recipe, learned=replace(recipe.learned, path=str(target)))
