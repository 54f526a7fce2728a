"""What training and curvature hold in memory: weights, gradients, optimizer, activations, logits, buffers.

All of it is known before anything runs. Bytes of a token that a block keeps for its backward pass were read off
autograd (`torch.autograd.graph.saved_tensors_hooks`) for Llama, BERT and GPT-2, in float32 and under autocast; those of
GPUs, of compiled blocks and of ZeRO agree with the peaks in tests/benchmarks/RESULTS.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from raysweep.costs import Size
from raysweep.curvature.cost import COPIES, LOGITS, Products
from raysweep.objectives.base import LOGIT_CHUNK_BYTES
from raysweep.resources import Resources
from raysweep.train.methods import Adapters
from raysweep.train.precision import Precision, settled

# Resident memory of a process beside what its tensors take: the C library's heap cannot reuse all that is freed.
HEAP = 1.12
# A saved state is copied file by file (train.saved_state.FILE_BYTES).
STATE_FILE = 2**28
# What DeepSpeed shares with each rank for collectives on a CPU (csrc/cpu/comm/shm.cpp): two times 32 and 1 MiB.
SHARED = 66 * 2**20
# Elements of a bucket that DeepSpeed reduces gradients in; its default.
BUCKET = 500_000_000
# Elements of whole weights that ZeRO-3 keeps at most (stage3_max_live_parameters), and fetches ahead; its defaults.
LIVE, AHEAD = 1_000_000_000, 50_000_000


@dataclass(frozen=True)
class Step:
    """A step of training on one worker, as far as its memory goes by it."""

    tokens: int
    """That a micro-batch reads."""
    optimizer_floats: int
    """Numbers that the optimizer keeps of a weight; AdamW 2."""
    logit_tokens: float | None = None
    """Of `tokens`, those whose logits are made at once; None: a few at a time on a GPU, all on a CPU."""
    in_half: bool = False
    """Whether products are taken in bfloat16."""
    on_gpu: bool = False
    compiled: bool = False
    recomputed: bool = False
    """Gradient checkpointing."""
    accumulates: bool = False
    """Whether there is more than one micro-batch."""
    zero_stage: int = 0
    num_workers: int = 1
    adapters: Adapters | None = None
    """That are trained beside frozen weights; None: the weights are trained."""

    @property
    def has_masters(self) -> bool:
        """Whether weights are in bfloat16, with float32 ones in the optimizer: under ZeRO alone. Else it is autocast
        that makes bfloat16 of float32 weights."""
        return self.in_half and self.zero_stage > 0

    def shards(self, stage: int) -> int:
        """Workers that what ZeRO shards from this stage on is sharded over (Rajbhandari et al., 2020)."""
        return self.num_workers if self.zero_stage >= stage else 1


@dataclass(frozen=True)
class TrainingSteps:
    """Steps of training as far as their memory goes by them, whatever gang takes them: equal ones take equal memory."""

    sequences: int
    """Of a batch, of all workers that share it."""
    length: int
    """Tokens of a sequence that the model reads."""
    optimizer_floats: int
    """See `Step`."""
    precision: Precision
    logits: float | None = None
    """Tokens of a sequence whose logits are made at once; None: a few at a time on a GPU, all on a CPU."""
    by_length: bool = False
    """Whether rows of like length are computed together: in several micro-batches, and not compiled."""
    adapters: Adapters | None = None
    """See `Step`."""

    def share(self, gang: Resources) -> int:
        """Sequences of a batch that fall to the worker that has most."""
        return -(-self.sequences // gang.workers)

    def micro_batch(self, gang: Resources) -> int:
        """Sequences that it takes at once."""
        share = self.share(gang)
        return min(gang.micro_batch_sequences or share, share)

    def step(self, gang: Resources) -> Step:
        """A step of that worker, where all of a gang work on it."""
        on_gpu, micro_batch = gang.gpus_per_worker > 0, self.micro_batch(gang)
        return Step(
            tokens=micro_batch * self.length,
            logit_tokens=None if self.logits is None else micro_batch * self.logits,
            optimizer_floats=self.optimizer_floats,
            in_half=settled(self.precision, on_gpu=on_gpu) == "bf16",
            on_gpu=on_gpu,
            compiled=gang.compiles and not self.by_length,
            recomputed=gang.gradient_checkpointing,
            accumulates=self.by_length or micro_batch < self.share(gang),
            zero_stage=gang.zero_stage,
            num_workers=gang.workers,
            adapters=self.adapters,
        )


def training_bytes(size: Size, step: Step) -> int:
    """Bytes in tensors at the peak of a step: whichever moment of it takes most.

    Without accumulation there are no gradients as the loss is made. They come as the backward pass frees activations,
    block by block from the last, so that either its first block or its last one is where a backward pass takes most.
    """
    weights, gradients, optimizer = held_bytes(size, step)
    block, entry = step.tokens * block_bytes(size, step), step.tokens * _stream_bytes(size, step)
    blocks = size.num_layers * (entry if step.recomputed else block)
    copies = 0 if step.has_masters or not step.in_half else 2 * size.block_parameters
    # float32, of the output layer; where it also embeds, what embeds adds a second one to it at the end.
    output = 4 * size.vocab_size * size.hidden_size if step.adapters is None else 0
    before = gradients if step.accumulates else 0
    work = step.tokens * _work_bytes(size, step)
    bucket = bucket_bytes(size, step)
    loss = before + copies + blocks + _loss_bytes(size, step) + 2 * entry
    # Where a block is recomputed, no copies but its own are left.
    first = before + bucket + output + blocks + work + entry + (block if step.recomputed else copies)
    # ZeRO-3 holds gradients until the bucket is full, and lays it out anew for each worker's part.
    buckets = bucket * (3 if step.zero_stage == 3 else 1)
    last = gradients + buckets + work + max(block, output if size.num_layers else 0)
    if step.on_gpu:  # From which a state's copies go to the host.
        return int(weights + optimizer + max(loss, first, last))
    saving = min(weights + optimizer, STATE_FILE)
    # As far as messages are long.
    shared = step.num_workers * min(SHARED, 4 * size.num_parameters) if step.num_workers > 1 else 0
    return int(HEAP * (weights + optimizer + max(loss, first, last, saving)) + shared)


def held_bytes(size: Size, step: Step) -> tuple[float, float, float]:
    """Weights, gradients at the end of a backward pass, and the optimizer's state with what it steps, as sharded."""
    trained, each = trained_parameters(size, step), 2 if step.has_masters else 4
    num = size.num_parameters + (trained if step.adapters else 0)
    weights = num * each / step.shards(3)
    gradients = 4 * trained / step.shards(2)
    optimizer = 4 * trained * step.optimizer_floats / step.shards(1)
    if step.zero_stage:  # Float32 ones beside the weights.
        optimizer += 4 * trained / step.shards(1)
    if step.zero_stage == 3:  # Those that are gathered, and those to come.
        weights += each * min(num, LIVE + AHEAD)
    return weights, gradients, optimizer


def trained_parameters(size: Size, step: Step) -> int:
    """Those that have gradients and an optimizer's state."""
    return size.adapter_parameters(step.adapters.rank) if step.adapters else size.num_parameters


def bucket_bytes(size: Size, step: Step) -> float:
    """Of gradients that DeepSpeed reduces together."""
    return (2 if step.has_masters else 4) * min(trained_parameters(size, step), BUCKET) if step.zero_stage else 0


def block_bytes(size: Size, step: Step) -> float:
    """What a block keeps of a token for its backward pass: see the module.

    Attention is fused: it keeps queries, keys, values, its output and a float32 number per head. Norms are fused on
    GPUs, and keep what they are of. Under autocast the stream between blocks, and norms, stay in float32, and each
    product has a bfloat16 copy of its input; compiled, products share it, and activations are made again.

    Adapters keep the inputs that frozen weights would not; with dropout also what it leaves of each, and a mask: of six
    inputs of width h in a Llama, fewer in others, and one of the feed-forward layers' width, taken as inner / 3.
    """
    hidden, inner = size.hidden_size, float(size.inner_numbers)
    beside = 4.0 * size.num_heads
    if step.adapters and step.adapters.has_dropout:
        beside += (4 if step.in_half else 6) * (6 * hidden + inner / 3)
    if step.compiled and step.on_gpu:
        inner = 3 * inner / 4
    if not step.in_half:
        return (32 if step.on_gpu else 40) * hidden + 4 * inner + beside
    if step.has_masters:
        return 16 * hidden + 2 * inner + beside
    if step.compiled and step.on_gpu:
        return 20 * hidden + 2 * inner + beside
    if step.on_gpu:
        return 26 * hidden + 2 * (inner + size.inner_float32) + beside
    return 34 * hidden + 2 * inner + beside


def _stream_bytes(size: Size, step: Step) -> float:
    """Of a token between two blocks."""
    return size.hidden_size * (2 if step.has_masters else 4)


def _work_bytes(size: Size, step: Step) -> float:
    """Of a token, while a block's backward pass is in its feed-forward layers: gradients, and what they are made of."""
    return (6 * size.hidden_size + size.inner_numbers) * (1 if step.in_half else 2)


def _loss_bytes(size: Size, step: Step) -> float:
    """The loss and its gradient, beside what the last block gives: see `objectives.output_loss`."""
    vocab, hidden, each = size.vocab_size, size.hidden_size, 2 if step.in_half else 4
    weight = vocab * hidden
    if step.logit_tokens is not None or not step.on_gpu:
        num = step.tokens if step.logit_tokens is None else step.logit_tokens
        # In float32, which their gradient overwrites; and the bfloat16 ones that these are made of.
        return num * vocab * (4 if each == 4 else 6) + (4 * weight if num else 0)
    states = step.tokens * hidden * each
    if step.compiled:
        chunks = -(-4 * step.tokens * vocab // LOGIT_CHUNK_BYTES) or 1
        size_of_chunk = -(-step.tokens // chunks)
        copy = 0 if step.has_masters or each == 4 else each * weight
        return 2 * each * size_of_chunk * vocab + 4 * weight + each * weight + copy + states
    # Liger's: as many rows at a time as make logits as large as the states, rounded up to a power of two.
    rows = 1 << (-(-step.tokens * hidden // vocab) - 1).bit_length() if step.tokens else 0
    return 2 * each * rows * vocab + 4 * weight + each * weight + (4 * weight if each == 2 else 0) + states


def product_bytes(
    size: Size,
    products: Products,
    *,
    sequences: int,
    length: int,
    parts: bool = False,
    on_gpu: bool = False,
    shards: int = 1,
) -> int:
    """Bytes in tensors at the peak of a product v'Hv on a batch, all in float32.

    An exact one keeps what its forward pass and that of the tangents made, and its attention is not fused: per block
    and token 58 h + 10 m + 17 a s bytes, with m the feed-forward layers' numbers and a s the attention's scores, as
    the allocator's events have it for Llamas.

    Args:
        size: of the model.
        products: how it is made.
        sequences: of the batch.
        length: tokens of a sequence.
        parts: whether single parameters are told apart, which takes gradients.
        on_gpu: see `Step`.
        shards: workers that weights and what is as large are sharded over.
    """
    hidden, tokens = size.hidden_size, sequences * length
    if products == "exact":
        block = 58.0 * hidden + 10 * size.inner_numbers + 17 * size.num_heads * length
        token = size.num_layers * block
    elif products == "gradient_differences" or parts:
        token = size.num_layers * block_bytes(size, Step(tokens=tokens, optimizer_floats=0, on_gpu=on_gpu))
    else:
        token = size.forward_bytes
    return int(size.weights_bytes * COPIES[products] / shards + tokens * (token + 4 * LOGITS * size.vocab_size))
