"""The examples in docstrings are true, and each public name of the curvature library has one."""

import doctest
import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import batch_for, build

import raysweep
import raysweep.curvature as curvature

ROOT = Path(raysweep.__file__).parent
MODULES = [
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    for path in sorted(ROOT.rglob("*.py"))
    if ">>>" in path.read_text() and path.name != "__init__.py"
]


def given(name: str) -> dict:
    """What the examples of a module take for granted; of the curvature library, see its docstring."""
    if not name.startswith("raysweep.curvature"):
        return {"torch": torch, "np": np, "model": build("llama")}
    model = build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)  # As smooth as a trained model.
    curvature.prepare(model)
    batches = [batch_for(model, seed=seed) for seed in range(40)]
    named = {name: getattr(curvature, name) for name in curvature.__all__}
    return {"torch": torch, "np": np, "model": model, "batches": batches, "batch": batches[0]} | named


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    with torch.random.fork_rng():
        failed, tried = doctest.testmod(module, extraglobs=given(name), optionflags=doctest.ELLIPSIS)
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize("name", curvature.__all__)
def test_every_public_name_of_curvature_has_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(curvature, name))
