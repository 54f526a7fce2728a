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


def projected_flow(
    contexts: Contexts, hidden: torch.Tensor, output: torch.Tensor, times: list[float], *, step: float = 0.02
) -> list[float]:
    """Tr H at `times` of d theta / d tau = -1/4 Proj grad Tr H along the solutions A W = C + 1 r' of a linear layer.

    The limit of SGD with labels drawn from the truth as eta -> 0, in tau = eta^2 k / B after k steps of B sentences
    (Li et al., 2022; paper 1, theorem 4.3). By Heun's method, with a Newton step back to the solutions after each.
    """
    size = len(output)
    centre = torch.eye(size, dtype=torch.float64) - 1 / size
    w, a = hidden.clone(), output.clone()
    exact = centre @ a @ w

    def normal(right: torch.Tensor, w: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The least (dW, dA) that moves P A W by `right`."""
        gram = torch.kron(centre, w.T @ w) + torch.kron(centre @ a @ a.T @ centre, torch.eye(size, dtype=w.dtype))
        multipliers = (torch.linalg.pinv(gram, hermitian=True) @ right.flatten()).view(size, size)
        return a.T @ centre @ multipliers, centre @ multipliers @ w.T

    def velocity(w: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w, a = w.clone().requires_grad_(), a.clone().requires_grad_()
        to_w, to_a = torch.autograd.grad(trace(contexts, w, a, activation="linear"), (w, a))
        w, a = w.detach(), a.detach()
        off_w, off_a = normal(centre @ (a @ to_w + to_a @ w), w, a)
        return -(to_w - off_w) / 4, -(to_a - off_a) / 4

    now, traces = 0.0, []
    for time in times:
        while now < time - 1e-9:
            by = min(step, time - now)
            first = velocity(w, a)
            second = velocity(w + by * first[0], a + by * first[1])
            w, a = w + by * (first[0] + second[0]) / 2, a + by * (first[1] + second[1]) / 2
            back = normal(exact - centre @ a @ w, w, a)
            w, a, now = w + back[0], a + back[1], now + by
        traces.append(float(trace(contexts, w, a, activation="linear")))
    return traces
