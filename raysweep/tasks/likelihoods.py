"""Log-likelihoods of the choices behind a prompt, which is read once for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from raysweep.objectives.logits import logits_at
from raysweep.tasks.prompts import can_go_on, read
from raysweep.tasks.rows import batch_tokens, in_batches, pad

TokenIds = Sequence[int]


def mean_log_likelihoods(
    model: PreTrainedModel, prompts: Sequence[TokenIds], choices: Sequence[Sequence[TokenIds]]
) -> list[list[float]]:
    """(1 / |c|) sum_t log p(c_t | prompt, c_<t) of each of a prompt's choices c, in nats per token.

    Args:
        model: a causal one, in evaluation mode.
        prompts: token ids, at least one each.
        choices: of each prompt, of any number: token ids, at least one each; with the prompt they fit into the model's
            positions.

    Returns:
        A value for each choice of each prompt, in order.
    """
    likelihoods = _behind_prompts if can_go_on(model) else _in_full

    def run(batch: list[int]) -> list[list[float]]:
        owners = [row for row, index in enumerate(batch) for _ in choices[index]]
        answers = [choice for index in batch for choice in choices[index]]
        values = iter(likelihoods(model, [prompts[index] for index in batch], owners, answers))
        return [[next(values) for _ in choices[index]] for index in batch]

    with torch.inference_mode():
        max_tokens = batch_tokens(on_gpu=model.device.type == "cuda")
        return in_batches([len(prompt) for prompt in prompts], run, max_tokens=max_tokens)


def _behind_prompts(
    model: PreTrainedModel, prompts: Sequence[TokenIds], owners: Sequence[int], answers: Sequence[TokenIds]
) -> list[float]:
    """Mean log-likelihood of each answer behind the prompt at its place in `owners`."""
    logits, kept = read(model, prompts)
    # The first token of every choice is predicted by what the prompt gave; only longer choices are read at all.
    first = torch.tensor([answer[0] for answer in answers], device=model.device)
    sums = _log_probabilities(logits, first, rows=torch.tensor(owners, device=model.device))

    def run(batch: list[int]) -> list[float]:
        # Without the last token of each, behind which nothing is asked for.
        given, mask = (
            torch.from_numpy(part).to(model.device) for part in pad([answers[at][:-1] for at in batch], value=0)
        )
        rows, columns = mask.nonzero(as_tuple=True)  # Row by row, in the order of `rest`.
        of_answers, _ = kept.select([owners[at] for at in batch]).extend(given, rows=rows, columns=columns)
        rest = torch.tensor([token for at in batch for token in answers[at][1:]], device=model.device)
        sums_of_rest = torch.zeros(len(batch), dtype=torch.float64, device=model.device)
        return sums_of_rest.index_add(0, rows, _log_probabilities(of_answers, rest)).tolist()

    longer = [at for at, answer in enumerate(answers) if len(answer) > 1]
    # The prompt counts, too: its keys and values are copied for every choice.
    width = kept.mask.shape[1]
    of_rest = in_batches(
        [width + len(answers[at]) for at in longer],
        lambda batch: run([longer[at] for at in batch]),
        max_tokens=batch_tokens(on_gpu=model.device.type == "cuda"),
    )
    totals = dict(enumerate(sums.tolist()))
    for at, value in zip(longer, of_rest, strict=True):
        totals[at] += value
    return [totals[at] / len(answer) for at, answer in enumerate(answers)]


def _in_full(
    model: PreTrainedModel, prompts: Sequence[TokenIds], owners: Sequence[int], answers: Sequence[TokenIds]
) -> list[float]:
    """As `_behind_prompts`, with the prompt read again for each answer: of models whose cache cannot be copied."""
    means = []
    for owner, answer in zip(owners, answers, strict=True):
        prompt = prompts[owner]
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        columns = torch.arange(len(prompt) - 1, ids.shape[1] - 1, device=model.device)
        logits, _ = logits_at(model, torch.zeros_like(columns), columns, input_ids=ids, use_cache=False)
        means.append(float(_log_probabilities(logits, ids[0, len(prompt) :]).mean()))
    return means


def _log_probabilities(logits: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Of tokens[k], in nats, float64, by logits[rows[k]]; rows: default each its own."""
    rows = torch.arange(len(tokens), device=tokens.device) if rows is None else rows
    logits = logits.float()
    return (logits[rows, tokens] - logits.logsumexp(dim=-1)[rows]).double()
