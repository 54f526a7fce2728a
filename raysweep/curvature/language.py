"""The mean token loss of a Hugging Face language model, causal or masked, with padding and ignored labels.

A batch is what the model takes: `input_ids` [n, L] (int64), and optionally `attention_mask` [n, L] (1 is read, 0 is
padding), `labels` [n, L], where -100 is not predicted, and `prefix_lengths` [n], of a causal model: so many tokens of a
row see each other, and are not predicted. A causal model predicts the label of each position from the positions before
it; without labels they are the tokens themselves. A masked model predicts labels in place.
A part of a batch numbers its sequences in the whole by `row` [n], so that they draw what they would draw there; it may
have nothing to predict.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers.activations import NewGELUActivation

from raysweep.allocator import keep_freed_memory
from raysweep.objectives.inputs import model_inputs
from raysweep.objectives.logits import logits_at

logger = logging.getLogger(__name__)

Tensor = torch.Tensor
Batch = Mapping[str, Tensor]

IGNORED = -100


def equal_batches(text: Batch, size: int) -> list[Batch]:
    """Batches of `size` sequences, or of fewer if there were else only one; the mean over them is that over tokens.

    What is left over at the end is left out.
    """
    num = len(text["input_ids"])
    size = max(1, min(size, num // 2))
    return [
        {name: rows[start : start + size] for name, rows in text.items()} for start in range(0, num - size + 1, size)
    ]


def is_causal(model: Any) -> bool:
    """Whether the model predicts the next token, rather than masked ones.

    Raises:
        ValueError: if it predicts no tokens at all.
    """
    name = type(model).__name__
    if model.get_output_embeddings() is None:
        raise ValueError(f"{name} predicts no tokens; load it with AutoModelForCausalLM or AutoModelForMaskedLM")
    return not name.endswith("ForMaskedLM")


def prepare(model: Any, *, twice_differentiable: bool = True) -> None:
    """Bring a model into the state in which its loss is a smooth function of its weights: dropout off.

    Embeddings no longer leave the row of the padding token out of gradients, as torch does in training: the loss
    depends on it wherever that token is read (end of text, where it pads too), and differences of losses see that.
    GPT-2's activation, eight operations in transformers, becomes torch's own of the same function. The process keeps
    what it frees, for the passes to come; see `allocator`.

    Args:
        model: a Hugging Face model; changed in place.
        twice_differentiable: also switch attention to an implementation that has a second derivative, which fused
            kernels have not. It is logged where it changes something.

    >>> prepare(model.train())
    >>> model.training, model.config._attn_implementation
    (False, 'eager')
    """
    keep_freed_memory()
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
        for name, part in module.named_children():
            if type(part) is NewGELUActivation:
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    implementation = getattr(model.config, "_attn_implementation", "eager")
    if twice_differentiable and implementation != "eager":
        logger.warning("attention is switched from %s to eager for exact curvature", implementation)
        model.set_attn_implementation("eager")


def targets(model: Any, batch: Batch) -> Tensor:
    """What is predicted at each position of `token_logits`: [n, L - 1] (causal) or [n, L]; -100 where nothing is.

    Args:
        model: causal or masked.
        batch: see the module; padding and the token after it on the left predict nothing.

    Raises:
        ValueError: if no token is predicted in a whole batch, a masked model's batch has no labels, or one is of a
            token that the model sees.

    >>> ids = torch.tensor([[3, 1, 4, 1]])
    >>> targets(model, {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0]])}).tolist()
    [[1, 4, -100]]
    """
    causal = is_causal(model)
    if "labels" not in batch and not causal:
        raise ValueError("a masked language model needs labels: the tokens that are masked in input_ids, else -100")
    labels = batch.get("labels", batch["input_ids"])
    if (mask := batch.get("attention_mask")) is not None:
        labels = labels.masked_fill(mask == 0, IGNORED)
        if causal:
            # A first token after padding on the left has nothing before it to be predicted from.
            starts = (mask[:, 1:] == 1) & (mask[:, :-1] == 0)
            labels = torch.cat([labels[:, :1], labels[:, 1:].masked_fill(starts, IGNORED)], dim=1)
    if (lengths := batch.get("prefix_lengths")) is not None:
        in_prefix = torch.arange(labels.shape[1], device=labels.device) < lengths[:, None]
        if "labels" in batch and bool((labels[in_prefix] != IGNORED).any()):
            raise ValueError("a label stands in a prefix that is seen both ways: it would be predicted from itself")
        labels = labels.masked_fill(in_prefix, IGNORED)
    if causal:
        labels = labels[:, 1:]
    if "row" not in batch and not bool((labels != IGNORED).any()):
        raise ValueError(f"no token is predicted in a batch of shape {tuple(batch['input_ids'].shape)}")
    return labels


def token_logits(model: Any, batch: Batch) -> Tensor:
    """Logits aligned with `targets`: [n, L - 1 or L, vocabulary], in float32, or float64 if the model is.

    Args:
        model: in eval mode.
        batch: see the module.

    Raises:
        ValueError: if dropout is on, which would make the loss a random function.

    >>> tuple(token_logits(model, batch).shape) == (*targets(model, batch).shape, model.config.vocab_size)
    True
    """
    _refuse_dropout(model)
    causal = is_causal(model)
    logits: Tensor = model(**model_inputs(model, batch), **({"use_cache": False} if causal else {})).logits
    if causal:
        logits = logits[:, :-1]
    return logits if logits.dtype == torch.float64 else logits.float()


def predicting_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of the m positions that predict a token [m, vocabulary], and their labels [m]: those alone are computed.

    A masked model's are a seventh of all. Otherwise as `token_logits` and `targets`.

    >>> logits, labels = predicting_logits(model, batch)
    >>> len(logits) == len(labels) == int((targets(model, batch) != IGNORED).sum())
    True
    """
    _refuse_dropout(model)
    labels = targets(model, batch)
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    without_cache = {"use_cache": False} if is_causal(model) else {}
    logits, _ = logits_at(model, rows, columns, **model_inputs(model, batch), **without_cache)
    return logits if logits.dtype == torch.float64 else logits.float(), labels[rows, columns]


def slope(p: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the summed cross-entropy with respect to the logits: p less the one-hot label, 0 where ignored.

    Args:
        p: softmax of the logits [..., vocabulary].
        labels: [...]; -100 is not predicted.
    """
    found = p.scatter_add(-1, labels.clamp(min=0)[..., None], -torch.ones_like(p[..., :1]))
    ignored = labels == IGNORED
    return found.masked_fill(ignored[..., None], 0) if bool(ignored.any()) else found


def mean_token_loss(model: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy, in nats per predicted token: a scalar that all curvature here is of.

    Args:
        model: in eval mode.
        batch: see the module.

    Raises:
        ValueError: if nothing is predicted, or dropout is on.

    >>> theirs = model(**batch, labels=batch["input_ids"]).loss
    >>> bool(torch.isclose(mean_token_loss(model, batch), theirs))
    True
    """
    return F.cross_entropy(
        token_logits(model, batch).flatten(0, 1), targets(model, batch).flatten(), ignore_index=IGNORED
    )


def _refuse_dropout(model: Any) -> None:
    if model.training:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Dropout) and module.p > 0:
                raise ValueError(
                    f"dropout is on in {name!r}: the loss would be a random function; call `prepare(model)` or "
                    "`model.eval()` first"
                )
        rates = {k: v for k, v in model.config.to_dict().items() if "drop" in k and isinstance(v, float) and v > 0}
        if rates:  # Some attention functions drop out without a module.
            raise ValueError(f"dropout is on ({rates}): call `prepare(model)` or `model.eval()` first")
