"""What a checkpoint's perplexity and flatness are of, in words, and which checkpoints they compare.

A loss of one objective and a loss of another are two quantities: the cross-entropy of hidden tokens is no smaller or
larger than that of next tokens in any sense that a ranking could use. Nor do losses on two texts compare, or how sharp
they are: news alone is an easier text than a mix, whatever the model. Nor do losses by token of two vocabularies, whose
tokens hold more or less of a text; bits per byte do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from raysweep.analysis.derived import is_swept
from raysweep.analysis.formatting import counted, is_share
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.families import Objective
from raysweep.scores import Column

if TYPE_CHECKING:
    import pandas as pd

TRAINING_LOSS_OF, PERPLEXITY_OF, FLATNESS_OF = "training_loss_of", "perplexity_of", "flatness_of"
OTHER_TEXT_OF = "other_text_of"
"""Columns of the checkpoint table: an objective in words, whose loss a checkpoint's numbers of a kind are."""
SPANS_OF, ONE_MIX = "spans_of", "one mix for all"
"""The column that says in which shares domains of the own text have spans cut out, and what it says where a sweep file
names them."""
VOCABULARY = "vocabulary"
"""The column that says which vocabulary a checkpoint's tokens are of; see `vocabularies`."""
LOSSES = (TRAINING_LOSS_OF, PERPLEXITY_OF, FLATNESS_OF, OTHER_TEXT_OF, SPANS_OF, VOCABULARY)
"""All columns that tell which of a checkpoint's losses compare."""
FEW_TOKENS = 16
"""Vocabularies whose sizes differ by no more may be one, with a pad or a mask token added to some."""
BYTES = "bits/byte"
"""The unit of a loss that compares over vocabularies."""
_WHAT = {
    PERPLEXITY_OF: "Held-out loss and perplexity",
    FLATNESS_OF: "Traces and other numbers of flatness",
    OTHER_TEXT_OF: "Losses on other corpora",
}

_OBJECTIVE: TypeAdapter[Any] = TypeAdapter(Objective)

_LOSS_OF = {
    "pretrain": TRAINING_LOSS_OF,
    "curve": TRAINING_LOSS_OF,
    "heldout": PERPLEXITY_OF,
    "flatness": FLATNESS_OF,
    # Of the loss whose perplexity is told, always.
    "noise": PERPLEXITY_OF,
    "quantization": PERPLEXITY_OF,
    "updates": PERPLEXITY_OF,
    "gradient_noise": PERPLEXITY_OF,
    "agreement": PERPLEXITY_OF,
    # Of the rows that this objective makes of the text: it is no loss, and hangs on what is read all the same.
    "features": PERPLEXITY_OF,
    # Of one for all, where the sweep file names it.
    "other_text": OTHER_TEXT_OF,
    "span_loss": SPANS_OF,
}
"""Kind of stage -> the column that says whose loss its metrics are of."""

_FORGETTING = frozenset({"forgetting_nats_per_token", "mean_forgetting"})
"""Of fine-tuning's metrics those of the loss whose perplexity is told; the others compare all checkpoints."""

_ON_OWN_TEXT = {kind for kind, column in _LOSS_OF.items() if column not in (TRAINING_LOSS_OF, OTHER_TEXT_OF)}
"""Kinds of stages whose metrics are of a loss on held-out text of the variant's own corpus."""


def losses_of(kind: str, spec: Mapping[str, Any]) -> dict[str, str]:
    """The columns that a stage tells of its checkpoint, from its recorded spec; none for a stage without a loss.

    A field that a spec leaves out had its neutral value: causal_lm.
    """
    if kind == "pretrain":
        recipe = spec.get("recipe")
        return {TRAINING_LOSS_OF: _words(recipe.get("objective") if isinstance(recipe, Mapping) else recipe)}
    if kind == "heldout":
        return {PERPLEXITY_OF: _words(spec.get("objective"))}
    if kind == "other_text":
        text = spec.get("text")
        return {OTHER_TEXT_OF: _words(text.get("loss") if isinstance(text, Mapping) else text)}
    if kind == "span_loss":
        return {SPANS_OF: ONE_MIX if spec.get("mix") else "the own mix"}
    return {FLATNESS_OF: _words(spec.get("loss"))} if kind == "flatness" else {}


def loss_groups(checkpoints: pd.DataFrame, column: Column) -> NDArray[np.int64]:
    """[rows]: equal numbers for checkpoints whose values of a metric are of one quantity, and so compare.

    Those are all checkpoints, unless it is a metric of the loss of an objective (flatness under `flatness.objective:
    own` is, and how much of it is forgotten); a checkpoint whose objective is not known has a number of its own. Of
    those, all but losses on other corpora are measured on a variant's own text: checkpoints compare where the sweep
    gave them the same.
    """
    import pandas as pd

    of_tokens = is_of_tokens(column)
    vocabularies = _vocabularies(checkpoints) if of_tokens else [""] * len(checkpoints)
    words = _told_by(column)
    if words is None:
        return _numbered(vocabularies)
    objectives = checkpoints[words] if words in checkpoints else [""] * len(checkpoints)
    is_one_mix = _of_domains(column) or (words == SPANS_OF and {*filter(pd.notna, objectives)} == {ONE_MIX})
    neutral = {"mix"} if is_one_mix else set()
    if not of_tokens:  # The same text, cut otherwise.
        neutral.add("tokenizer")
    texts = [()] * len(checkpoints) if words == OTHER_TEXT_OF else _own_texts(checkpoints, neutral)
    keys = [
        place if pd.isna(objective) else (objective, text, vocabulary)
        for place, (objective, text, vocabulary) in enumerate(zip(objectives, texts, vocabularies, strict=True))
    ]
    return _numbered(keys)


def compares(checkpoints: pd.DataFrame, target: str) -> bool:
    """Whether a target compares all checkpoints that have one: by token it does so within one vocabulary alone."""
    return is_share(target) or len({*_vocabularies(checkpoints[checkpoints[target].notna()])}) < 2


def with_bytes(columns: Sequence[Column], checkpoints: pd.DataFrame) -> list[Column]:
    """The columns, with bits per byte as an indicator where checkpoints have several vocabularies.

    Where they have one, they order checkpoints as the loss by token does, which is one already.
    """
    if len(_known_vocabularies(checkpoints)) < 2:
        return list(columns)
    return [
        replace(column, metric=replace(column.metric, direction="min")) if column.metric.unit == BYTES else column
        for column in columns
    ]


def _told_by(column: Column) -> str | None:
    """The column that says whose loss a metric is of; None: of none."""
    if column.kind == "sft":
        return PERPLEXITY_OF if column.metric.name in _FORGETTING else None
    return _LOSS_OF.get(column.kind)


def _numbered(keys: Sequence[Hashable]) -> NDArray[np.int64]:
    """[n]: equal numbers for equal keys."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _vocabularies(checkpoints: pd.DataFrame) -> list[str]:
    """[rows]: what tells their vocabularies from others; empty where it is not known."""
    if VOCABULARY not in checkpoints:
        return [""] * len(checkpoints)
    return list(map(str, checkpoints[VOCABULARY].fillna("")))


def _known_vocabularies(checkpoints: pd.DataFrame) -> list[str]:
    return sorted({*_vocabularies(checkpoints)} - {""})


def is_of_tokens(column: Column) -> bool:
    """Whether a metric is of a loss by token, and so another quantity for each vocabulary.

    A column of a table that somebody gave has no unit: its name tells, where it is called as in a run.
    """
    name, unit = column.metric.name, column.metric.unit
    if not unit:
        unit = BYTES if "bits_per_byte" in name else "nats" if "nats" in name or "log_likelihood" in name else ""
    return unit.startswith("nats") or (_told_by(column) is not None and unit != BYTES)


def _of_domains(column: Column) -> bool:
    """Whether it is of each domain by itself, so that the shares of a mix take no part in it."""
    return column.kind == "agreement" or (column.kind == "heldout" and column.metric.name.startswith("ppl_"))


def _own_texts(checkpoints: pd.DataFrame, neutral: Collection[str] = ()) -> list[tuple[str, ...]]:
    """[rows]: what the sweep sets of the text that a variant is measured on; equal for all where it sets nothing of it.

    Training text counts, as tokenizers are made of it and text may be held out of it; its amount alone does not. The
    data of an earlier phase count, too, which may cost pairs that would compare.

    Args:
        neutral: fields of the data that make no difference here.
    """
    columns = []
    for name in filter(is_swept, map(str, checkpoints.columns)):
        first, *path = name.removeprefix("point.").rsplit(":", 1)[-1].split(".")
        of_text = first == "pretrain" and ("data" in path or path[-1:] == ["sequence_length"])
        if of_text and not any(_is_neutral(field, neutral) for field in path):
            codes, values = checkpoints[name].factorize(use_na_sentinel=False)
            texts = [_text(value, neutral) for value in values]
            columns.append([texts[code] for code in codes])
    return list(zip(*columns, strict=True)) if columns else [()] * len(checkpoints)


def _text(value: object, neutral: Collection[str]) -> str:
    """A setting of the text, a JSON object without what makes no difference to it."""
    try:
        fields = json.loads(str(value))
    except ValueError:
        return str(value)
    if isinstance(fields, dict):
        fields = {name: field for name, field in fields.items() if not _is_neutral(name, neutral)}
    return json.dumps(fields, sort_keys=True)


def _is_neutral(field: str, neutral: Collection[str]) -> bool:
    return field.startswith("num_train") or field in neutral


def _words(objective: Any) -> str:
    if objective and not isinstance(objective, Mapping):  # No spec writes that.
        return f"unknown ({json.dumps(objective)})"
    fields = {name: value for name, value in (objective or CausalLM().model_dump()).items() if name != "VERSION"}
    try:
        made = _OBJECTIVE.validate_json(json.dumps(fields))
    except ValidationError:  # As another version declared it: told from others by its fields, if not described.
        return f"{fields.get('name')} ({json.dumps(fields, sort_keys=True)})"
    return f"{made.name} ({made.predicts()})"


def objective_lines(checkpoints: pd.DataFrame) -> list[str]:
    """What the losses in a checkpoint table are of, a sentence each."""
    lines = []
    for what, counts in _of_objectives(checkpoints):
        total = sum(counts.values())
        named = [f"{words}, on {number} of {total} checkpoints" for words, number in counts.items()]
        lines.append(f"{what} are those of {'; of '.join(named if len(named) > 1 else counts)}.")
    return lines


def objective_cautions(checkpoints: pd.DataFrame) -> list[str]:
    """Which losses must not be compared, where checkpoints were trained by several objectives."""
    lines = []
    for what, counts in _of_objectives(checkpoints):
        if len(counts) > 1:
            kinds = Counter(words.split(" ")[0] for words in counts)
            names = [f"{num} of {name}" if num > 1 else name for name, num in sorted(kinds.items())]
            lines.append(
                f"{what} are of {len(counts)} objectives ({', '.join(names)}), whose losses do not compare: pairs of "
                "checkpoints of different objectives are not counted for them, and #n is a place within one objective."
            )
    num_texts = len(set(_own_texts(checkpoints)))
    words = [str(name).split("/") for name in checkpoints if "/" in str(name)]
    measured = {each[0] for each in words} & _ON_OWN_TEXT
    measured |= {"forgetting" for each in words if each[0] == "sft" and each[-1] in _FORGETTING}
    if num_texts > 1 and measured:
        lines.append(
            f"What is measured on a variant's own text ({', '.join(sorted(measured))}) is on "
            f"{num_texts} texts: pairs of checkpoints of different texts are not counted for it, and #n is a place "
            "within one. Perplexities of a domain, agreement, and losses on spans where span_loss.mix is named, "
            "compare over mixes, but not over tags and lengths of documents; losses of other_text over all."
        )
    return lines


def vocabulary_cautions(checkpoints: pd.DataFrame) -> list[str]:
    """What does not compare where checkpoints have several vocabularies."""
    if len(names := _known_vocabularies(checkpoints)) < 2:
        return []
    return [
        f"Checkpoints have {len(names)} vocabularies: {', '.join(names)}{_nearly(names)}. Losses and likelihoods by "
        "token do not compare over them: such pairs are not counted, and #n is a place within one vocabulary. Bits per "
        "byte compare over all."
    ]


def _nearly(names: Collection[str]) -> str:
    """That vocabularies differ in a few tokens, as where one has a pad or a mask token more."""
    sizes = [int(size) for size, _, rest in (name.partition(" ") for name in names) if size.isdigit() and rest]
    more = max(sizes, default=0) - min(sizes, default=0)
    if len(sizes) < len(names) or not 0 < more <= FEW_TOKENS:
        return ""
    return f" (one has {counted(more, 'token')} more)"


def _of_objectives(checkpoints: pd.DataFrame) -> list[tuple[str, dict[str, int]]]:
    """(what is measured, objective in words -> number of checkpoints measured by it), what is of the same ones once."""
    found: dict[tuple[tuple[str, int], ...], str] = {}
    for column, what in _WHAT.items():
        if counts := tuple(_counts(checkpoints, column).items()):
            found[counts] = f"{found[counts]}, {what[0].lower()}{what[1:]}" if counts in found else what
    return [(what, dict(counts)) for counts, what in found.items()]


def _counts(checkpoints: pd.DataFrame, column: str) -> dict[str, int]:
    """Objective in words -> number of checkpoints measured by it."""
    if column not in checkpoints:
        return {}
    return {str(words): int(number) for words, number in sorted(checkpoints[column].value_counts().items())}
