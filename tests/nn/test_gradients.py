"""Quantized layers have gradients by their inputs where the model's code wants them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils import _pytree as pytree

from autoquant.kernels.engine import make_engine
from autoquant.methods.applier import Applier
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from tests.nn.conftest import make


@pytest.mark.parametrize("name", ["convolutions", "volumes", "attention", "recurrent", "cells"])
@pytest.mark.parametrize("activation", [ActivationScheme(8), ActivationScheme(8, "per_token")])
@pytest.mark.parametrize("deployed", [False, True], ids=["switched", "deployed"])
def test_a_gradient_changes_no_output_and_is_near_the_float_models(name, activation, deployed):
    case = dataclasses.replace(make(name), mode=torch.enable_grad)

    def slopes(model):
        """Return the outputs, and the gradients of their sum by the inputs."""
        args = pytree.tree_map(_wanting, case.args)
        outputs = dataclasses.replace(case, args=args).run(model)
        inputs = [x for x in pytree.tree_leaves(args) if _is_real(x)]
        total = sum(y.square().sum() for y in outputs)
        return outputs, torch.autograd.grad(total, inputs)

    expected = slopes(case.model)[1]
    prepared = prepare(case.model, case.run, engine=make_engine(torch.device("cpu")))
    applier = Applier(prepared, calibrate(prepared, [None], case.run))
    recipe = SiteRecipe(WeightScheme(8), activation)
    sites = {site.name: recipe for site in prepared.sites}
    model = prepared.model
    if deployed:
        model = applier.deploy(sites)
    else:
        applier.apply(sites)
    with prepared.engine.reference(), torch.no_grad():
        plain = dataclasses.replace(case, mode=torch.no_grad).run(model)
    outputs, found = slopes(model)
    for y, z in zip(outputs, plain, strict=True):
        assert torch.allclose(y, z, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.97


def _is_real(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _wanting(x):
    return x.detach().clone().requires_grad_() if _is_real(x) else x
