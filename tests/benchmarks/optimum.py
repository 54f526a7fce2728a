"""(i) Models trained long on languages of a known law: how far their own objective's loss is from the lowest.

python tests/benchmarks/optimum.py            # half an hour of one core
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import numpy as np

from raysweep.data.corpora import Corpus, read_law
from raysweep.data.hmm import HMM
from raysweep.data.packing import Tokens
from raysweep.data.pcfg import PCFG
from raysweep.objectives.base import ObjectiveSpec
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.objectives.prefix_lm import PrefixLM
from raysweep.objectives.span_corruption import SpanCorruption
from raysweep.stages.pretrain import Pretrain, Recipe
from raysweep.stages.specials import checkpoint_specials
from raysweep.train.checkpoints import load_model
from raysweep.train.evaluate import heldout
from raysweep.train.models import Bert, Llama
from raysweep.train.optimizers import AdamW
from raysweep.train.schedules import WSD
from raysweep.worker import Worker

SIZES = {"vocabulary": 8, "sentence_length": 8, "num_train_sentences": 1_000_000, "num_valid_sentences": 4_000}
LANGUAGES: dict[str, Corpus] = {
    "hmm": HMM(**SIZES, num_states=4, num_permutations=3, emission_temperature=0.5),
    "pcfg": PCFG(**SIZES, num_nonterminals=4, num_rules=2, num_words=3, temperature=0.7),
}
OBJECTIVES: dict[str, ObjectiveSpec] = {
    "causal_lm": CausalLM(),
    "masked_lm": MaskedLM(name="masked_lm", mask="one"),
    "prefix_lm": PrefixLM(name="prefix_lm"),
    "span_corruption": SpanCorruption(name="span_corruption", density=0.3, mean_span_length=1.5),
}


def trained(language: Corpus, objective: ObjectiveSpec, *, steps: int, folder: Path) -> tuple[Path, Path]:
    """Folders of the checkpoint and of the tokens."""
    tokens, out = folder / "tokens", folder / "checkpoint"
    for each in (tokens, out):
        each.mkdir()
    language.build(tokens)
    recipe = Recipe(
        data=language,
        objective=objective,
        model=Llama(hidden_size=32, num_layers=2, num_heads=2)
        if objective.head == "causal"
        else Bert(name="bert", hidden_size=32, num_layers=2, num_heads=2, num_positions=32),
        optimizer=AdamW(lr=3e-3, weight_decay=0.0),
        # Half of the steps lower the rate: what is left of the gap is mostly the noise of the last ones.
        schedule=WSD(name="wsd", decay=0.5),
        steps=steps,
        batch_sequences=256,
        sequence_length=9,
    )
    Pretrain(recipe=recipe, seed=0, step=steps).run({"tokens": tokens}, out, Worker())
    return out, tokens


def gap_of(checkpoint: Path, folder: Path, objective: ObjectiveSpec) -> tuple[float, float, float, float]:
    """Lowest loss, error of the held-out loss itself, gap and error of the gap, in nats per predicted token."""
    tokens, law = Tokens(folder), read_law(folder, objective)
    assert law is not None
    ids = tokens.valid(*tokens.domains, sequence_length=9, max_sequences=4_000)
    specials = checkpoint_specials(checkpoint, objective)
    rows = objective.prepare(ids, np.random.default_rng(1), specials)
    measured = heldout(load_model(checkpoint), rows, objective)
    optimum = objective.optimal_losses(law, ids, rows, specials)
    means = measured.losses / measured.num_predicted
    error = float(means.std(ddof=1) / math.sqrt(len(means)))
    return float(optimum.sum() / measured.num_predicted.sum()), error, *measured.above(optimum)


def main(languages: list[str], objectives: list[str], steps: int) -> None:
    print("| language | objective | lowest loss | gap ± its error | error of the loss itself | CPU s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in languages:
        for kind in objectives:
            began = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                checkpoint, tokens = trained(LANGUAGES[name], OBJECTIVES[kind], steps=steps, folder=Path(folder))
                lowest, error, gap, stderr = gap_of(checkpoint, tokens, OBJECTIVES[kind])
            seconds = time.process_time() - began
            print(
                f"| {name} | {kind} | {lowest:.4f} | {gap:.4f} ± {stderr:.4f} | {error:.4f} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=list(LANGUAGES))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--steps", type=int, default=8_000)
    given = parser.parse_args()
    main(given.languages, given.objectives, given.steps)
