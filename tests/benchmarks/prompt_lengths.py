"""How long few-shot prompts of a sweep over text are, by the tokenizer that it trains, and how many do not fit.

`RAYSWEEP_DATA=FOLDER python tests/benchmarks/prompt_lengths.py search_spaces/indicators_50.yaml [KEY=VALUE ...]`
prints a table; no model is made.
"""

from __future__ import annotations

import sys

import numpy as np

from raysweep.data.text import Text
from raysweep.space import load
from raysweep.tasks.qa import QA
from raysweep.tasks.rows import MAX_LENGTH, prompt_ids
from raysweep.tasks.text import TextTask


def main() -> None:
    """Of each task prompt and longest answer, with as many solved examples as the sweep asks for."""
    declared = load(sys.argv[1], sys.argv[2:]).declared
    indicators, corpus = declared.indicators, declared.pretrain.data
    assert indicators
    assert declared.sft
    assert isinstance(corpus, Text)
    tokenizer = corpus.tokenizer.build(corpus._training_texts)
    print("| task | solved | tokens, median | a tenth above | most | may have | do not fit |\n" + "| --- " * 7 + "|")
    for name, task in declared.sft.tasks.items():
        if not isinstance(task, TextTask):
            continue
        shots = indicators.kshot_by_task.get(name, indicators.kshot)
        examples = task.examples("indicator")[: indicators.max_examples]
        asked = [task.shot_text(task.examples("train")[:shots]) + task.prompt(each) for each in examples]
        answers = [max(task.right_answers(each), key=len) for each in examples]
        prompts = prompt_ids(tokenizer, asked)
        whole = prompt_ids(tokenizer, [f"{ask} {answer}" for ask, answer in zip(asked, answers, strict=True)])
        # An answer that is decoded needs room, too.
        room = task.max_new_tokens if isinstance(task, QA) else 0
        lengths = [max(len(one) + room, len(other)) for one, other in zip(prompts, whole, strict=True)]
        most = task.max_length or MAX_LENGTH
        row = [np.median(lengths), np.quantile(lengths, 0.9), max(lengths), most]
        cut = np.mean([length > most for length in lengths])
        print("|", " | ".join([name, str(shots), *(f"{value:,.0f}" for value in row), f"{cut:.1%}"]), "|")


if __name__ == "__main__":
    main()
