"""Curvature of language-model losses: numerics on tensors that know no stage, file or cluster.

    from raysweep.curvature import TraceSettings, measure_traces, prepare
    prepare(model)                                     # any Hugging Face causal or masked language model
    measured = measure_traces(model, batches, TraceSettings(rse=0.05))
    measured.traces.hessian.interval()                 # 95 %, in nats per predicted token

Examples in the docstrings have a tiny Llama as `model`, brought into shape by `prepare`, and random `batches` of 3
sequences of 6 tokens, of which `batch` is one; `python -m pytest tests/unit/test_doctests.py` runs them all.

Names are imported when they are first used: a plan reads costs from here, and must not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "averages": ("Estimate", "Part", "Traces"),
    "estimators": ("frobenius_norm", "hutch_plus_plus", "hutchinson", "xtrace"),
    "gradient_noise": ("noise_and_signal",),
    "ghost": ("GhostNorms",),
    "language": ("mean_token_loss", "prepare", "targets", "token_logits"),
    "linear": ("Operator", "curvature_operator"),
    "measure": ("Measured", "paired_difference", "measure_traces"),
    "operators": ("choose_parameters", "finite_difference_product", "hessian_vector_products", "named_parameters"),
    "probes": ("probe_vector",),
    "samples": ("sample_sequences",),
    "sensitivity": ("crossed_mean", "noise_vector"),
    "settings": ("ShapeSettings", "TraceSettings"),
    "shape": ("measure_shape",),
    "sharpness": ("adaptive_trace", "average_sharpness", "relative_flatness", "worst_sharpness"),
    "spectrum": ("Density", "Eigenpairs", "lanczos", "spectral_density", "top_eigenpairs"),
    "tangents": ("forward_over_reverse_product", "gauss_newton_product", "reverse_over_forward_product"),
    "units": ("Unit", "fisher_unit", "probe_unit"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
