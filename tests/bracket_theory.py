"""The one-layer model on the bracket language in closed form: references of tests and benchmark."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch

from raysweep.data.brackets import Brackets


class Contexts(NamedTuple):
    """All bags of K = T - 1 words, each with its probability."""

    ids: torch.Tensor
    """A row of tokens each, [n, T + 1], int64: what opens a sentence, the words, the mask."""
    z: torch.Tensor
    """counts / sqrt(K), [n, V], float64."""
    probability: torch.Tensor
    """[n], sums to 1."""
    truth: torch.Tensor
    """p(masked word | the others), [n, V]."""


def all_contexts(language: Brackets) -> Contexts:
    """Of V kinds and K words there are C(V + K - 1, K)."""
    num, num_words = language.sentence_length - 1, language.num_words_total
    bags = np.array(list(itertools.combinations_with_replacement(range(num_words), num)))
    counts = (bags[:, :, None] == np.arange(num_words)).sum(axis=1)
    orders = [math.factorial(num) / math.prod(map(math.factorial, row)) for row in counts.tolist()]
    s = np.where(bags < num_words // 2, 1, -1).sum(axis=1)
    # Summed over the types of the masked word.
    weight = np.array(orders) * sum(np.exp(-language.beta * (s + type_) ** 2 / 4) for type_ in (-1, 1))
    opens = 1 / (1 + np.exp(language.beta * s))[:, None]
    truth = np.where(np.arange(num_words) < num_words // 2, opens, 1 - opens) / (num_words // 2)
    ends = np.zeros((len(bags), 1), np.int64)
    ids = np.concatenate([ends, bags + 1, ends + num_words + 1], axis=1)
    z = counts / math.sqrt(num)
    return Contexts(*map(torch.from_numpy, (ids, z, weight / weight.sum(), truth)))


def minimal_loss(contexts: Contexts) -> float:
    """Entropy of the masked word given the others, in nats."""
    return float((contexts.probability[:, None] * contexts.truth * -contexts.truth.log()).sum())


def gap(contexts: Contexts, hidden: torch.Tensor, output: torch.Tensor, *, activation: str = "relu") -> float:
    """E KL(truth || model) of W [m, V] and A [V, m], in nats."""
    h = contexts.z @ hidden.T
    logits = (h.relu() if activation == "relu" else h) @ output.T
    kl = (contexts.truth * (contexts.truth.log() - logits.log_softmax(dim=1))).sum(dim=1)
    return float(contexts.probability @ kl)


def trace(contexts: Contexts, hidden: torch.Tensor, output: torch.Tensor, *, activation: str = "relu") -> torch.Tensor:
    """Tr H of the loss at a solution, a scalar in nats.

    There H = E J' (diag p - pp') J, with J the logits' derivative: E |h|^2 (1 - sum p^2) for A, and for W the sum over
    neurons of E f'(w.z)^2 |z|^2 var_p(a), a the neuron's column of A.
    """
    pre = contexts.z @ hidden.T
    slope, h = ((pre > 0).to(pre.dtype), pre.relu()) if activation == "relu" else (torch.ones_like(pre), pre)
    p = (h @ output.T).softmax(dim=1)
    variance = p @ output.square() - (p @ output).square()
    of_output = h.square().sum(dim=1) * (1 - p.square().sum(dim=1))
    of_hidden = contexts.z.square().sum(dim=1) * (slope * variance).sum(dim=1)
    return contexts.probability @ (of_output + of_hidden)
