"""The indicator study's table, which tests/benchmarks/RESULTS.md tells of, can be ranked without the run."""

import pytest
from benchmarks.indicators import read

from raysweep.analysis.ranking import MEAN_LIKELIHOOD, rank

RIGHT = {"other_text/mean_loss": 0.886, "span_loss/loss_nats_per_token": 0.239, "features/effective_rank": 0.834}


def test_the_studys_table_says_what_is_reported():
    table, columns = read()
    other = [column.name for column in columns if column.name not in RIGHT and column.kind != "sft"]
    ranking = rank(table.drop(columns=other), columns=columns, target=MEAN_LIKELIHOOD)
    assert (len(table), ranking.num_variants, ranking.num_comparisons) == (68, 62, 2278)
    right = {item.indicator: item.accuracy.value for item in ranking.associations}
    assert {name: right[name] for name in RIGHT} == pytest.approx(RIGHT, abs=1e-3)
