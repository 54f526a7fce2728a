"""What a measurement of curvature is asked for: one declaration for sweep files, the command line and Python.

Imports nothing heavy, so that a plan can read it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raysweep.curvature.cost import Products
from raysweep.spec import Neutral, Spec

Distribution = Literal["rademacher", "gaussian"]
"""Of a probe vector's entries: +1 or -1, or normal. Signs have the smaller variance (Hutchinson, 1990)."""

Head = Literal["probed", "closed_form"]
"""How the output layer's own block of the Hessian is made: by probes as all others, or exactly."""


class TraceSettings(Spec):
    """When a trace is sure enough, and how it is made.

    Raises:
        pydantic.ValidationError: a ValueError, that names the field and what it may be.

    >>> TraceSettings(rse=0.02).max_units
    256
    """

    rse: float = Field(default=0.05, gt=0)
    """Relative standard error of the Hessian's and the Fisher's trace at which to stop."""
    min_units: int = Field(default=12, ge=2)
    """Batches that are measured at least, for an error that can be trusted."""
    max_units: int = Field(default=256, ge=2)
    """Probe vectors, and label draws, at most."""
    max_unit_batches: int = Field(default=16, ge=1)
    """Batches that share a probe vector at most: as many as make the target cheapest, told by the first units, where
    products are logit_differences and no parts are asked for; see `groups`. 1: each has its own."""
    products: Products = "logit_differences"
    """How v'Hv is made, at 1, 2 or 3 gradients; the first tells no Hessian traces of parts."""
    distribution: Distribution = "rademacher"
    """Of the probe vectors' entries."""
    head: Annotated[Head, Neutral("probed")] = "probed"
    """closed_form: the output layer's own block is exact and probes are of the rest, where logits are those of a linear
    layer; with logit_differences alone, and the model is held whole by each worker. As sure with fewer probes, a fifth
    where a model knows little more than how frequent tokens are; see `curvature.head`."""
    parts: Annotated[bool, Neutral(False)] = False
    """Also the traces of single parameters: the Fisher matrix's, and where `products` tell them the Hessian's."""
    seed: int = Field(default=0, ge=0)
    """Of probe vectors, label draws and the order of the text."""

    @model_validator(mode="after")
    def _head_is_beside_differences(self) -> TraceSettings:
        if self.head == "closed_form" and self.products != "logit_differences":
            raise ValueError(f"head: closed_form goes with products: logit_differences, not {self.products}")
        return self


class ShapeSettings(Spec):
    """What is measured beyond traces: the spectrum, sharpness, scale-free forms.

    Takes about `num_steps * (num_vectors + 2)` exact Hessian-vector products and as many losses; keeps `num_steps`
    vectors of the size of the model.

    >>> ShapeSettings(num_steps=10).num_vectors
    3
    """

    num_eigenvalues: int = Field(default=5, ge=1)
    """Largest eigenvalues to report."""
    num_steps: int = Field(default=30, ge=2)
    """Lanczos steps of each start vector."""
    num_vectors: int = Field(default=3, ge=2)
    """Start vectors of the spectral density."""
    rho: float = Field(default=0.05, gt=0)
    """Radius of the ball in which the worst case is sought (SAM; Foret et al., 2021, use 0.05)."""
    adaptive_rho: float = Field(default=0.5, gt=0)
    """Radius where each weight is scaled by its own size (ASAM; Kwon et al., 2021, use 0.5)."""
    noise: float = Field(default=1e-3, gt=0)
    """By how much all weights are moved at random for the average."""
    geodesic_rho: Annotated[float, Neutral(0.0)] = Field(default=0.0, ge=0)
    """Radius of a ball on the quotient by attention's symmetries, such as 0.1 (da Silva et al., 2025); 0: not measured.
    For models of the Llama, GPT-2 or BERT kind."""
    adaptive_noise: float = Field(default=0.03, gt=0)
    """Which part of itself each weight is moved by, in the adaptive form."""
