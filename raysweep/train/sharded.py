"""A checkpoint's model under DeepSpeed ZeRO-3 for forward and backward passes without an optimizer."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raysweep.train.checkpoints import load_model
from raysweep.worker import Worker


@contextlib.contextmanager
def sharded_model(checkpoint: Path, worker: Worker) -> Iterator[tuple[Any, Callable[[], None]]]:
    """While in it, a float32 model of which each worker holds its shard of every parameter, and no more.

    Args:
        checkpoint: see `checkpoints.load_model`, which loads each rank's shards.
        worker: this rank, of a gang whose process group is made.

    Yields:
        The model, and a function that lets go of weights which a backward pass may have left gathered.
    """
    import deepspeed
    import torch
    from transformers.integrations import HfDeepSpeedConfig

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            # Nothing stays gathered: a weight that is kept would not move with its shards.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        },
        "steps_per_print": 10**9,  # Never: it would print on every rank.
    }
    linear = torch.nn.functional.linear  # Replaced for good otherwise, as in `engines.DeepSpeedEngine`.
    try:
        partitioning = HfDeepSpeedConfig(config)  # While it lives, models are partitioned as they are loaded.
        model = load_model(checkpoint)
        del partitioning
        engine = deepspeed.initialize(model=model, config=config)[0]
        try:
            yield engine.module, engine.optimizer.partition_all_parameters
        finally:
            engine.destroy()
            del engine, model
            gc.collect()
    finally:
        torch.nn.functional.linear = linear
