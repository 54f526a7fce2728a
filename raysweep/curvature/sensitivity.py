"""How much a loss rises when noise is put on the weights, and how sure the mean of such rises is."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from raysweep.curvature.averages import Estimate
from raysweep.curvature.estimators import at_least
from raysweep.curvature.operators import named_parameters
from raysweep.curvature.probes import Tensors
from raysweep.curvature.sharpness import linear_weights

Floats = npt.NDArray[np.float64]

NoiseScale = Literal["absolute", "per_tensor", "per_row"]
"""What the standard deviation of the noise is in units of: 1; the root mean square of each parameter's entries; that of
each row of a matrix, which is what a neuron or a token has for weights. Vectors, such as gains, have one row."""


def noise_vector(model: Any, scale: NoiseScale, normal: Tensors) -> Tensors:
    """Noise on every parameter, its standard deviation by `scale`.

    Args:
        model: whose parameters that require a gradient get noise.
        scale: see `NoiseScale`. What is 0 throughout gets none, but for the absolute one.
        normal: name -> tensor like the parameter, of standard normal numbers; it is left as it is, so that one draw
            serves all scales.

    Returns:
        name -> tensor like the parameter.

    >>> normal = probe_vector(named_parameters(model), seed=0, probe=0, distribution="gaussian")
    >>> noise = noise_vector(model, "per_tensor", normal)
    >>> weight = model.lm_head.weight
    >>> bool(abs(noise["model.embed_tokens.weight"].std() / weight.square().mean().sqrt() - 1) < 0.15)
    True
    """
    if scale == "absolute":
        return normal
    parameters = named_parameters(model)
    rows_are_neurons = linear_weights(model, parameters)
    vector = {}
    for name, parameter in parameters.items():
        squares = parameter.detach().square()
        if scale == "per_tensor" or parameter.ndim < 2:
            squares = squares.mean()
        elif rows_are_neurons.get(name, True):  # An embedding has a row for each token.
            squares = squares.flatten(1).mean(dim=1).view(-1, *[1] * (parameter.ndim - 1))
        else:
            squares = squares.mean(dim=0, keepdim=True)
        vector[name] = normal[name] * squares.sqrt()
    return vector


def crossed_mean(rises: Floats, counts: npt.NDArray[np.int64]) -> Estimate:
    """Mean rise per token over draws of noise and pieces of text, each draw on each piece, with its standard error.

    With r_kb the rise of draw k on piece b, n_b its tokens and N their sum: m = sum_kb r_kb / (K N). Draws and pieces
    are both random, so that its variance is that of the draws' means / K, plus that of a ratio of sums over pieces
    (Cochran, 1977, chapter 6), less what both have of the interaction, which counts once (Searle et al., 1992, 4.4).

    Args:
        rises: [K, B], summed over a piece's tokens; at least 2 of each.
        counts: n, [B].

    Returns:
        In the unit of the rises, per token. Degrees of freedom are those of what there is least of.

    Raises:
        ValueError: if there are fewer than 2 draws or pieces.

    >>> estimate = crossed_mean(np.array([[1.0, 3.0], [3.0, 5.0]]), np.array([1, 1]))
    >>> estimate.mean, round(estimate.stderr, 3)  # 2 of draws and 2 of pieces, over 2 each.
    (3.0, 1.414)
    """
    num_draws, num_pieces = rises.shape
    at_least(2, num_draws, "draws of noise")
    at_least(2, num_pieces, "pieces of text")
    total = float(counts.sum())
    by_draw, by_piece = rises.sum(axis=1) / total, rises.mean(axis=0)
    mean = float(by_draw.mean())
    off_piece = by_piece - mean * counts
    left = rises - by_draw[:, None] * counts - off_piece
    of_draws = float(by_draw.var(ddof=1)) / num_draws
    of_pieces = num_pieces / (num_pieces - 1) * float((off_piece**2).sum()) / total**2
    both = float((left**2).sum()) / (num_draws * (num_draws - 1)) * num_pieces / (num_pieces - 1) / total**2
    # By chance the interaction may come out above what it is a part of.
    variance = max(of_draws + of_pieces - both, of_draws, of_pieces)
    return Estimate(mean, math.sqrt(variance), min(num_draws, num_pieces) - 1)
