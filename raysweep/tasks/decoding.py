"""Greedy answers of one line, each decoded no further than that line."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raysweep.tasks.prompts import can_go_on, read
from raysweep.tasks.rows import batch_tokens, in_batches, pad

NO_TOKEN = -1
"""What stands in place of a token, and ends an answer, where no logit is a number."""


def first_lines(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
) -> list[str | None]:
    """The first line that is not blank of the greedy continuation of each prompt, without blanks around it.

    Args:
        model: a causal one, in evaluation mode.
        tokenizer: decodes what it writes.
        prompts: token ids, at least one each; with `max_new_tokens` more they fit into the model's positions.
        max_new_tokens: after which an answer ends in any case.

    Returns:
        An answer for each prompt, in order; empty where the text ends before a line begins, None where the model's
        numbers are none, so that no token is the likeliest.
    """
    decode = _decode if can_go_on(model) else _generate

    def run(batch: list[int]) -> list[str | None]:
        rows = [prompts[index] for index in batch]
        made = decode(model, tokenizer, rows, max_new_tokens=max_new_tokens)
        texts = tokenizer.batch_decode(
            [[token for token in row if token != NO_TOKEN] for row in made], skip_special_tokens=True
        )
        return [None if NO_TOKEN in row else _first_line(text) for row, text in zip(made, texts, strict=True)]

    with torch.inference_mode():
        max_tokens = batch_tokens(on_gpu=model.device.type == "cuda")
        return in_batches([len(prompt) for prompt in prompts], run, max_tokens=max_tokens)


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].strip()


def _decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
) -> list[list[int]]:
    """Tokens behind each prompt, up to the one that ends the text or the first line; an answer that ended costs nothing
    while others go on."""

    # By token: whether an answer's line may be over is asked after each, and decoding all of it each time is slow.
    @cache
    def breaks_line(token: int) -> bool:
        return "\n" in tokenizer.decode([token])

    def is_complete(answer: list[int]) -> bool:
        if answer[-1] in (NO_TOKEN, tokenizer.eos_token_id) or len(answer) == max_new_tokens:
            return True
        return breaks_line(answer[-1]) and "\n" in tokenizer.decode(answer, skip_special_tokens=True).lstrip()

    logits, kept = read(model, prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    while True:
        tokens = logits.argmax(dim=-1).where(~logits.isnan().any(dim=-1), NO_TOKEN)
        for index, token in zip(going, tokens.tolist(), strict=True):
            answers[index].append(token)
        rows = [row for row, index in enumerate(going) if not is_complete(answers[index])]
        if not rows:
            return answers
        # Rows that are done are dropped from the cache: later steps cost as many rows as still go on.
        if len(rows) < len(going):
            kept, tokens, going = kept.select(rows), tokens[rows], [going[row] for row in rows]
        every = torch.arange(len(going), device=tokens.device)
        logits, kept = kept.extend(tokens[:, None], rows=every, columns=torch.zeros_like(every))


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
) -> list[list[int]]:
    """Tokens behind each prompt by the model's own `generate`, for models that keep more than keys and values."""
    # Padding goes to the left, so that all prompts end where the answer begins; the mask keeps it unseen.
    ids, mask = (torch.from_numpy(part).to(model.device) for part in pad(prompts, value=0, left=True))
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return made[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]
