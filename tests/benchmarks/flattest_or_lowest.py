"""Does the flattest checkpoint within 1 % of the best loss beat the lowest loss after fine-tuning?

    raysweep run search_spaces/flat_minima_text.yaml --store STORE
    python tests/benchmarks/flattest_or_lowest.py search_spaces/flat_minima_text.yaml --store STORE [OVERRIDE ...]

Seeds are what varies: in each, both are picked from the same candidates, and the difference of their scores is taken.
Where both picks are one checkpoint, the difference is 0. Intervals are Student's, over seeds.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import pandas as pd

from raysweep.analysis.choosing import chosen_of
from raysweep.results import Results
from raysweep.search import Choose, Within

LOSS, SCORE = "heldout/loss_nats_per_token", "sft/mean_score"
TRACES = ("flatness/fisher_trace", "flatness/hessian_trace")
EQUAL_COMPUTE = ("plain-2x", "sam", "sam-far", "asam", "trace-penalty", "agreement")
# 97.5 % quantiles of Student's t, by degrees of freedom.
T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: np.ndarray) -> str:
    """Mean, and half width of a 95 % interval over seeds, in points."""
    half = T[len(values) - 1] * values.std(ddof=1) / math.sqrt(len(values))
    return f"{100 * values.mean():+.2f} ± {100 * half:.2f}"


def picks(seed: pd.DataFrame, trace: str) -> tuple[pd.Series, pd.Series]:
    """The lowest loss, and the flattest of those nearly as low."""
    lowest = seed.loc[seed[LOSS].idxmin()]
    choose = Choose(metric=trace, mode="min", within=Within(metric=LOSS, mode="min", part=0.01))
    chosen = chosen_of(seed, choose)
    assert chosen
    return lowest, seed.loc[seed["checkpoint"] == chosen.row["checkpoint"]].iloc[0]


def main() -> None:
    """Print both comparisons, then a row for each way to finish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep")
    parser.add_argument("--store", required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    table = Results.open(args.sweep, store=args.store, overrides=args.overrides).checkpoints
    table = table.dropna(subset=[LOSS, SCORE, *TRACES])
    table = table.assign(finish=table["point.finish"])
    print("| candidates | flat by | flattest less lowest loss, points | differ in | picks: lowest / flattest |")
    print("| --- | --- | --- | --- | --- |")
    for name, among in (
        ("equal tokens", table["finish"] != "plain-2x"),
        ("equal compute", table["finish"].isin(EQUAL_COMPUTE)),
    ):
        for trace in TRACES:
            both = [picks(seed, trace) for _, seed in table[among].groupby("seed")]
            differences = np.array([flattest[SCORE] - lowest[SCORE] for lowest, flattest in both])
            differ = sum(lowest["finish"] != flattest["finish"] for lowest, flattest in both)
            said = ", ".join(f"{lowest['finish']} / {flattest['finish']}" for lowest, flattest in both)
            print(f"| {name} | {trace} | {interval(differences)} | {differ} of {len(both)} seeds | {said} |")
    print("\n| finish | loss, nats/token | Fisher trace | Hessian trace | score, % | less plain | less plain-2x |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    scores = table.pivot(index="seed", columns="finish", values=SCORE)
    for finish, rows in table.groupby("finish", sort=False):
        means = rows[[LOSS, *TRACES, SCORE]].mean()
        against = [
            "" if finish == other else interval((scores[finish] - scores[other]).to_numpy())
            for other in ("plain", "plain-2x")
        ]
        flat = " | ".join(f"{means[trace]:.0f}" for trace in TRACES)
        print(f"| {finish} | {means[LOSS]:.4f} | {flat} | {100 * means[SCORE]:.1f} | {' | '.join(against)} |")


if __name__ == "__main__":
    main()
