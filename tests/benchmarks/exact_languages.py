"""(f) Languages of a known law: tokens drawn a second, and seconds for exact conditionals at every place."""

from __future__ import annotations

import time

from raysweep.data.exact import TRAIN, ExactCorpus
from raysweep.data.hmm import HMM
from raysweep.data.pcfg import PCFG

# The sizes that the bars are set for: 200 words, 20 hidden symbols, sentences of 32 words.
LANGUAGES = (
    PCFG(num_words_total=200, num_nonterminals=20, sentence_length=32),
    HMM(num_words_total=200, num_states=20, sentence_length=32),
)


def sampling(language: ExactCorpus) -> float:
    """Millions of tokens a CPU second; the best of three, as other work on the machine only takes away."""
    rates = []
    for seed in range(3):
        began = time.process_time()
        words, _ = language.sample(100_000, seed=seed, stream=TRAIN)
        rates.append(words.size / (time.process_time() - began) / 1e6)
    return max(rates)


def conditionals(language: ExactCorpus) -> tuple[float, float]:
    """CPU seconds of all conditionals of 8,192 sentences, from the words before and from those around."""
    words, _ = language.sample(8192, seed=0, stream=TRAIN)
    seconds = []
    for seen in ("before", "around"):
        began = time.process_time()
        language.word_probabilities(words, seen=seen)
        seconds.append(time.process_time() - began)
    return seconds[0], seconds[1]


def main() -> list[tuple[str, str]]:
    rows = []
    for language in LANGUAGES:
        before, around = conditionals(language)
        rows += [
            (f"(f) {language.name}: sampling", f"{sampling(language):.1f} M tokens a CPU second (bar 1)"),
            (
                f"(f) {language.name}: conditionals of 8,192 x 32 words, causal / masked",
                f"{before:.2f} / {around:.2f} CPU seconds (bar 5)",
            ),
        ]
    return rows


if __name__ == "__main__":
    for row in main():
        print(*row, sep=": ")
