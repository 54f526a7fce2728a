"""At a model with the true probabilities the Hessian is the Fisher matrix; elsewhere it is not."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from raysweep.curvature.measure import measure_traces
from raysweep.curvature.operators import hessian_vector_products, named_parameters
from raysweep.curvature.settings import TraceSettings
from raysweep.curvature.units import Unit, fisher_unit
from raysweep.data.pcfg import PCFG

GRAMMAR = PCFG(vocabulary=3, num_words=3, num_nonterminals=3, num_rules=2, sentence_length=4, temperature=0.5)
SENTENCES = np.array(list(itertools.product(range(3), repeat=4)))


class PrefixTable(nn.Module):
    """Next-word logits from a state for each prefix: it can represent any law of sentences.

    Without the sinh, logits would be bilinear, and the trace of H - G nought everywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="eager")
        size = GRAMMAR.vocab_size
        self.states = nn.Embedding(size**4, size)
        self.head = nn.Linear(size, size, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, use_cache=False):
        """Prefixes as numbers in base `size`; the last position predicts nothing."""
        size, number, index = GRAMMAR.vocab_size, torch.zeros_like(input_ids[:, 0]), []
        for words in input_ids[:, :-1].T:
            number = number * size + words
            index.append(number % size**4)
        index.append(torch.zeros_like(number))
        return SimpleNamespace(logits=self.head(self.states(torch.stack(index, dim=1)).sinh()))


@pytest.fixture(scope="module")
def ids():
    return torch.from_numpy(GRAMMAR.rows(SENTENCES))


@pytest.fixture(scope="module")
def probabilities():
    found = np.exp(GRAMMAR.log_probability(SENTENCES))
    assert found.sum() == pytest.approx(1)
    return torch.from_numpy(found)


@pytest.fixture
def model(ids, probabilities):
    """The grammar itself, written in a basis of its own so that the head is no identity."""
    torch.manual_seed(0)
    model = PrefixTable().double().eval()
    basis = torch.randn(GRAMMAR.vocab_size, GRAMMAR.vocab_size, dtype=torch.float64)
    logits = torch.full((model.states.num_embeddings, GRAMMAR.vocab_size), -20.0, dtype=torch.float64)
    for position in range(4):
        prefixes = ids[:, : position + 1]
        number = torch.zeros(len(ids), dtype=torch.int64)
        for words in prefixes.T:
            number = (number * GRAMMAR.vocab_size + words) % model.states.num_embeddings
        joint = torch.zeros_like(logits)
        joint.index_put_((number, ids[:, position + 1]), probabilities, accumulate=True)
        rows = joint.sum(dim=1) > 0
        logits[rows] = (joint / joint.sum(dim=1, keepdim=True)).log().clamp(min=-20)[rows]
    with torch.no_grad():
        model.head.weight.copy_(basis)
        model.states.weight.copy_(torch.linalg.solve(basis, logits.T).T.asinh())
    return model


def traces(model, ids, probabilities):
    """Of the Hessian, by unit vectors, and of the Gauss-Newton matrix, from the Jacobian, of the expected mean loss."""
    parameters = named_parameters(model)

    def loss():
        logits = model(ids).logits[:, :-1]
        tokens = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return (probabilities * tokens.mean(dim=1)).sum()

    used = {"states.weight": _used(model, ids), "head.weight": torch.arange(16)}
    hessian = gauss_newton = 0.0
    p = model(ids).logits[:, :-1].softmax(dim=-1).detach()
    for name, entries in used.items():
        vectors = []
        for entry in entries.tolist():
            vector = {key: torch.zeros_like(part) for key, part in parameters.items()}
            vector[name].view(-1)[entry] = 1
            vectors.append(vector)
        products = hessian_vector_products(loss, parameters, vectors)
        hessian += sum(float(product[name].view(-1)[e]) for product, e in zip(products, entries.tolist(), strict=True))
        for vector in vectors:
            change = torch.func.jvp(
                lambda parts: torch.func.functional_call(model, parts, (ids,)).logits[:, :-1],
                ({key: part.detach() for key, part in parameters.items()},),
                (vector,),
            )[1]
            spread = (p * change.square()).sum(-1) - (p * change).sum(-1).square()
            gauss_newton += float((probabilities * spread.mean(dim=1)).sum())
    return hessian, gauss_newton


def _used(model, ids):
    """Entries of the table that some prefix reads: the others have no curvature."""
    model.zero_grad()
    model(ids).logits[:, :-1].square().sum().backward()
    return model.states.weight.grad.flatten().nonzero()[:, 0]


def test_hessian_and_fisher_are_equal_at_the_true_probabilities(model, ids, probabilities):
    hessian, gauss_newton = traces(model, ids, probabilities)
    assert hessian == pytest.approx(gauss_newton, rel=1e-6)
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.roll(1, dims=0))  # The words change places.
    hessian, gauss_newton = traces(model, ids, probabilities)
    assert abs(hessian / gauss_newton - 1) > 0.02


def test_estimates_on_the_grammars_own_sentences_find_it(model, ids, probabilities):
    truth, _ = traces(model, ids, probabilities)
    words, _ = GRAMMAR.sample(600, seed=1, stream=1)
    batches = [{"input_ids": part} for part in torch.from_numpy(GRAMMAR.rows(words)).split(2)]
    found = measure_traces(model, batches, TraceSettings(rse=0.03, max_units=1024, products="exact")).traces
    for estimate in (found.hessian, found.fisher, found.gauss_newton):
        assert abs(estimate.mean - truth) < 4 * estimate.stderr
    assert abs(found.residual.mean) < 4 * found.residual.stderr
    # There, and only there, labels of the data are as good as the model's own, summed over a sequence.
    own = [fisher_unit(model, batch, Unit("fisher", i, 0), seed=0, labels="data") for i, batch in enumerate(batches)]
    values = np.array([unit["fisher"] / unit["num_tokens"] for unit in own])
    assert abs(values.mean() - truth) < 4 * values.std(ddof=1) / len(values) ** 0.5
