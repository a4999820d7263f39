"""What a recipe and a search space say: frozen values, free of torch."""

from autoquant.spec.recipe import (
    FLOAT_SITE,
    ActivationScheme,
    Evidence,
    ModelIdentity,
    Recipe,
    SiteRecipe,
    SplitResult,
    WeightScheme,
)
from autoquant.spec.verdict import Verdict

__all__ = [
    "FLOAT_SITE",
    "ActivationScheme",
    "Evidence",
    "ModelIdentity",
    "Recipe",
    "SiteRecipe",
    "SplitResult",
    "Verdict",
    "WeightScheme",
]
