"""A pretraining run, opened: its tokens, its tokenizer and the weights it begins with; what its stages train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raysweep.data.packing import Begin, Tokens
from raysweep.data.tokenizers import load_tokenizer
from raysweep.errors import DataError
from raysweep.objectives.base import Arrays, add_extra_tokens
from raysweep.objectives.optimum import LabelledLaw
from raysweep.stages.phases import Before
from raysweep.train.precision import settled
from raysweep.worker import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raysweep.stages.pretrain import Recipe
    from raysweep.train.loop import Training

OPTIMIZER = "optimizer.safetensors"
"""In the folder of an optimizer's state."""


class Trajectory:
    """What a recipe trains under a seed.

    Args:
        recipe: of this phase.
        seed: of the run.
        before: what a later phase goes on from, in numbers.
        inputs: `tokens`; `start`, the checkpoint it goes on from, with the tokenizer that this one has learnt;
            `optimizer`, the folder of the state to go on with.

    Raises:
        DataError: if the checkpoint that it starts from has not as many positions as the data takes.
    """

    def __init__(self, recipe: Recipe, seed: int, before: Before | None, inputs: Mapping[str, Path]) -> None:
        self.recipe, self.seed, self.before = recipe, seed, before
        self.tokens = Tokens(inputs["tokens"])
        self.start, self._optimizer = inputs.get("start"), inputs.get("optimizer")
        self.tokenizer = load_tokenizer(self.start or self.tokens.tokenizer_dir)
        self._specials = add_extra_tokens(self.tokenizer, recipe.objective)
        self._order = self.tokens.batches(
            recipe.data.mix,
            sequence_length=recipe.sequence_length,
            seed=seed,
            begin=Begin(before.sequences, before.read) if before else None,
        )
        self.model = self._first_model()
        self.config, self.num_parameters = self.model.config, self.model.num_parameters()

    def train(self, stop_step: int, worker: Worker, *, optimizer_out: Path | None = None) -> Training:
        """Train up to a step of this phase; see `train.loop.train`.

        Raises:
            StageError: if the objective, the optimizer or the model does not do what it says; see the checks.
        """
        from raysweep.objectives.inputs import check_prefixes
        from raysweep.objectives.loss_check import check_loss
        from raysweep.train.loop import train
        from raysweep.train.optimizer_check import check_optimizer

        recipe, first = self.recipe, self._batch(0)
        check_loss(recipe.objective, first, sequence_length=recipe.sequence_length)
        check_optimizer(recipe.optimizer, is_cut=worker.zero_stage > 0)
        if "prefix_lengths" in first:
            check_prefixes(self.model)
        return train(
            self.model,
            self._batch,
            objective=recipe.objective,
            optimizer=recipe.optimizer,
            schedule=recipe.schedule,
            num_steps=recipe.num_steps,
            seed=self.seed,
            steps_before=self._steps_before,
            stop_step=stop_step,
            clip_norm=recipe.clip_norm,
            bf16=settled(recipe.precision, on_gpu=worker.device.startswith("cuda")) == "bf16",
            worker=worker,
            states=worker.state_dir,
            is_start_exact=self.start is not None,
            optimizer_from=self._optimizer and self._optimizer / OPTIMIZER,
            optimizer_out=optimizer_out,
            flat=recipe.flat,
        )

    @property
    def _steps_before(self) -> int:
        return self.before.steps if self.before else 0

    def _batch(self, step: int) -> Arrays:
        ids = self._order.batch(step, self.recipe.batch_sequences)
        # By the step counted over all phases: a run that goes on draws what it would have drawn in one piece.
        at = self._steps_before + step
        objective, flat = self.recipe.objective, self.recipe.flat
        rows = objective.prepare(ids, np.random.default_rng([self.seed, 4, at]), self._specials)
        if flat:
            rows = flat.relabel(rows, np.random.default_rng([self.seed, 5, at]), self._specials)
        if flat and flat.needs_domains:
            rows |= {"domains": self._order.domains(step, self.recipe.batch_sequences)}
        if objective.reads_labels:
            assert isinstance(self.recipe.data, LabelledLaw)  # The recipe has seen to it.
            rows |= objective.from_law(self.recipe.data, ids, rows)
        return rows

    def _first_model(self) -> PreTrainedModel:
        import torch

        from raysweep.train.checkpoints import load_model, max_tokens

        recipe = self.recipe
        length = recipe.input_length
        if self.start is None:
            assert recipe.model
            # A corpus may declare more rows than its tokenizer has come to use.
            rows = max(self.tokens.meta.vocab_size, len(self.tokenizer))
            return recipe.model.build(vocab_size=rows, sequence_length=length, seed=self.seed, corpus=recipe.data)
        model = load_model(self.start)
        # Rows for tokens that this phase's objective adds, drawn from the seed: the same on every rank.
        if model.get_input_embeddings().num_embeddings < len(self.tokenizer):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                model.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        positions = max_tokens(model) or length
        if length > positions:
            if not getattr(model.config, "rope_parameters", None):
                raise DataError(
                    f"pretrain.sequence_length {recipe.sequence_length:,} takes {length:,} positions, and the "
                    f"checkpoint that training starts from has {positions:,}; lower it"
                )
            model.config.max_position_embeddings = length  # Rotary positions have no end.
        return model
