"""Loss on text of other corpora: found with the sweep file, and that of a naive loop."""

import numpy as np
import pytest
import torch
from tiny import NOTES

from raysweep.data.tokenizers import load_tokenizer
from raysweep.errors import RaysweepError
from raysweep.results import Results
from raysweep.runners import run_sweep
from raysweep.space import load
from raysweep.train.checkpoints import load_model

SWEEP = (
    NOTES
    + """\
other_text: {texts: {tales: {files: tales.txt}}, num_sequences: 20}
"""
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "notes.txt").write_text("la si do re mi fa sol " * 200)
    (tmp_path / "tales.txt").write_text("once upon a time there was a king " * 40)
    return tmp_path


def test_another_text_is_read_by_the_checkpoints_own_tokenizer(folder, sweep_file, store):
    run = run_sweep(load(sweep_file(SWEEP)), store, runner="inline")
    [row] = Results(run).checkpoints.to_dict("records")
    checkpoint = store.folder(row["checkpoint"])
    model, tokenizer = load_model(checkpoint).eval(), load_tokenizer(checkpoint)
    text = (folder / "tales.txt").read_text()
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    rows = torch.tensor(ids[:160]).view(20, 8)
    with torch.no_grad():
        loss = float(model(input_ids=rows, labels=rows).loss)
    assert row["other_text/loss_tales"] == pytest.approx(loss, rel=1e-5)
    assert row["other_text/bits_per_byte_tales"] == pytest.approx(loss / np.log(2) * len(ids) / len(text), rel=1e-5)
    assert row["other_text/loss_tales"] > row["heldout/loss_nats_per_token"]


def test_models_of_any_objective_are_read_by_one(folder, sweep_file, store):
    text = SWEEP.replace("  steps: 4\n", "  objective: {name: span_corruption}\n  steps: 4\n")
    text = text.replace("sequence_length: 8", "sequence_length: 24").replace("num_sequences: 20", "num_sequences: 6 ")
    text = text.replace("{tales: {files: tales.txt}}", "{tales: {files: tales.txt}, notes: {files: notes.txt}}")
    own, by_one = text, text.replace("6 }", "6, objective: {name: causal_lm}}")
    both = [Results(run_sweep(load(sweep_file(each)), store, runner="inline")) for each in (own, by_one)]
    [first], [row] = (results.checkpoints.to_dict("records") for results in both)
    model, tokenizer = (make(store.folder(row["checkpoint"])) for make in (load_model, load_tokenizer))
    ids = [*tokenizer((folder / "tales.txt").read_text())["input_ids"], tokenizer.eos_token_id]
    rows = torch.tensor(ids[:144]).view(6, 24)
    with torch.no_grad():
        loss = float(model.eval()(input_ids=rows, labels=rows).loss)
    assert row["other_text/loss_tales"] == pytest.approx(loss, rel=1e-5)
    assert first["other_text/loss_tales"] != row["other_text/loss_tales"]
    assert [each["other_text_of"].split()[0] for each in (first, row)] == ["span_corruption", "causal_lm"]
    assert row["other_text/mean_loss"] == pytest.approx(
        (row["other_text/loss_tales"] + row["other_text/loss_notes"]) / 2
    )
    with pytest.raises(RaysweepError, match="masked_lm is of masked models, and pretrain's is a causal one"):
        load(sweep_file(text.replace("6 }", "6, objective: {name: masked_lm}}")))


def test_what_the_file_holds_is_part_of_the_id_and_where_it_lies_is_not(folder, sweep_file):
    def stage_id(text=SWEEP):
        stages = load(sweep_file(text)).trial({}, 0).stages
        return next(stage.id for stage in stages if stage.kind == "other_text")

    first = stage_id()
    (folder / "moved.txt").write_text((folder / "tales.txt").read_text())
    assert stage_id(SWEEP.replace("files: tales", "files: moved")) == first
    (folder / "tales.txt").write_text("another tale " * 40)
    assert stage_id() != first


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("files: tales.txt", "files: none.txt", r"tiny\.yaml:9: other_text\.texts\.tales\.files: .*none\.txt"),
        ("num_sequences: 20", "num_sequences: 20, text: null", "text is taken from pretrain"),
        ("{tales:", "{a/b:", "text name 'a/b'"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(folder, sweep_file, old, new, words):
    assert old in SWEEP
    with pytest.raises(RaysweepError, match=words):
        load(sweep_file(SWEEP.replace(old, new)))


def test_words_of_a_made_up_language_spell_no_text(folder, sweep_file):
    made_up = "{name: pcfg, vocabulary: 16, num_nonterminals: 4, num_rules: 2, num_words: 3, sentence_length: 4}"
    start, end = SWEEP.index("{name: text"), SWEEP.index("  model:")
    text = SWEEP[:start] + made_up + "\n" + SWEEP[end:].replace("sequence_length: 8", "sequence_length: 5")
    with pytest.raises(RaysweepError, match=r"other_text needs pretrain\.data text, not pcfg"):
        load(sweep_file(text))


def test_what_an_earlier_phase_was_trained_by_may_be_measured_later(folder, sweep_file, store):
    """Its tokens are in the tokenizer from then on."""
    phases = (
        "  phases: [{name: spans, steps: 2, objective: {name: span_corruption}}, "
        "{name: next, steps: 2, objective: {name: causal_lm}}]\n"
    )
    text = SWEEP.replace("  steps: 4\n", phases).replace("sequence_length: 8", "sequence_length: 24")
    text = text.replace("num_sequences: 20", "num_sequences: 6, objective: {name: OBJECTIVE}")
    asked = text.replace("OBJECTIVE", "span_corruption")
    [row] = Results(run_sweep(load(sweep_file(asked)), store, runner="inline")).checkpoints.to_dict("records")
    assert row["other_text/loss_tales"] > 0
    with pytest.raises(
        RaysweepError, match=r"ul2 writes '.*', a token that pretrain's objectives up to causal_lm show no"
    ):
        load(sweep_file(text.replace("OBJECTIVE", "ul2")))
    # What the second trains by, the first does not show.
    turned = asked.replace("causal_lm", "first").replace("span_corruption}}, ", "causal_lm}, checkpoints: [1.0]}, ")
    with pytest.raises(RaysweepError, match=r"span_corruption writes '.*', a token that pretrain's objectives up to"):
        load(sweep_file(turned.replace("{name: first}", "{name: span_corruption}")))
