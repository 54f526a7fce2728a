"""The shipped sweep over real text, at a reduced budget, on Ray with gangs of two under ZeRO-2."""

import os
from pathlib import Path

import pytest
from tiny import results_of

from raysweep.analysis.tables import checkpoint_table
from raysweep.results import Results
from raysweep.runners import run_sweep
from raysweep.space import load

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("RAYSWEEP_DATA", "nowhere"))

REDUCED = {
    "tokens: 1_600_000": "tokens: 8_192",
    "checkpoints: [195, 391]": "checkpoints: [8]",
    "batch_sequences: 32": "batch_sequences: 8",
    "hidden_size: 96, num_layers: 3": "hidden_size: 48, num_layers: 1",
    "hidden_size: 160, num_layers: 5": "hidden_size: 80, num_layers: 2",
    "flatness: {num_sequences: 512}": "flatness: {num_sequences: 16, min_units: 4, max_units: 8}",
    "max_examples: 100": "max_examples: 8",
    "max_train_examples: 400": "max_train_examples: 16",
    "max_train_examples: 200": "max_train_examples: 16",
    "max_test_examples: 300": "max_test_examples: 12",
    "max_test_examples: 200": "max_test_examples: 12",
    "max_test_examples: 100": "max_test_examples: 12",
    "max_valid_examples: 100": "max_valid_examples: 8",
    "max_valid_examples: 60": "max_valid_examples: 8",
    "max_valid_examples: 40": "max_valid_examples: 8",
}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="RAYSWEEP_DATA names no data pack")
def test_eight_variants_of_real_text(tmp_path, store, small_pack):
    text = (ROOT / "search_spaces/text.yaml").read_text().replace("${RAYSWEEP_DATA}", str(small_pack))
    for old, new in REDUCED.items():
        assert old in text, old
        text = text.replace(old, new)
    path = tmp_path / "text.yaml"
    path.write_text(text)
    run = run_sweep(load(path), store)
    assert run.failures() == []
    assert len(run.trials()) == 8
    assert len(results_of(run)) == 1 + 8 * (4 + 6)
    table = checkpoint_table(run)
    assert len(table) == 8
    assert table["sft/mean_score"].notna().all()
    assert {"heldout/ppl_wiki", "heldout/bits_per_byte", "indicators/kshot_mean"} <= set(table)
    assert Results(run).ranking.best is not None
    assert Results(run).write_report().stat().st_size > 1_000_000
