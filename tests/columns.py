"""What the stages of a sweep declare, for tables and records that tests make by hand."""

from raysweep.data.pcfg import PCFG
from raysweep.objectives.causal_lm import CausalLM
from raysweep.scores import MEANS, Column
from raysweep.stages.agreement import Agreement
from raysweep.stages.base import StageSpec
from raysweep.stages.curve import Curve
from raysweep.stages.early_sft import EarlySft
from raysweep.stages.features import FeatureRank
from raysweep.stages.flatness import Flatness
from raysweep.stages.gradient_noise import GradientNoise
from raysweep.stages.harness import HarnessScore, PinnedTask
from raysweep.stages.held_text import HeldText
from raysweep.stages.heldout import Heldout
from raysweep.stages.indicators import Indicators
from raysweep.stages.lm_eval import HarnessTask, LmEval
from raysweep.stages.noise import Noise
from raysweep.stages.other_text import OtherText, Texts
from raysweep.stages.pretrain import Pretrain, Recipe
from raysweep.stages.probe import Probe
from raysweep.stages.probes import Probes
from raysweep.stages.quantization import Quantization
from raysweep.stages.sft import Sft
from raysweep.stages.span_loss import SpanLoss
from raysweep.stages.updates import Updates
from raysweep.tasks.spans import PCFGSpan
from raysweep.train.models import Llama
from raysweep.train.optimizers import AdamW

CORPUS = PCFG()
TASK = PCFGSpan(form="pcfg_span", span=1, grammar=CORPUS)
RECIPE = Recipe(data=CORPUS, model=Llama(), optimizer=AdamW(lr=1), steps=1, batch_sequences=1, sequence_length=33)
TEXT = HeldText(loss=CausalLM(), mix={"text": 1.0}, sequence_length=33)
OF_MODELS: tuple[StageSpec, ...] = (
    Pretrain(recipe=RECIPE, seed=0, step=1),
    Heldout(objective=CausalLM(), mix={"text": 1.0}, sequence_length=33),
    Flatness(own_samples=2, sequence_length=33),
    Indicators(tasks={"t": TASK}),
    Agreement(loss=CausalLM(), sequence_length=33),
    Probes(num_labels=(64, 1000), tasks={"t": TASK}),
    Noise(text=TEXT),
    Quantization(text=TEXT),
    Updates(text=TEXT, tasks={"t": TASK}),
    EarlySft(tasks={"t": TASK}),
    GradientNoise(text=TEXT),
    Curve(),
    FeatureRank(text=TEXT),
    SpanLoss(text=TEXT),
    OtherText(texts={"notes": Texts(files=("notes.txt",))}, text=TEXT),
)
HARNESS_TASK = PinnedTask(
    version="0.4",
    name="quiz",
    fingerprint="1",
    files=("quiz.yaml",),
    data={},
    digests={},
    revision="",
    num_fewshot=2,
    output_type="multiple_choice",
    max_new_tokens=0,
    scores=(HarnessScore(metric="acc", filter="none", direction="max"),),
)
OF_TASKS: tuple[StageSpec, ...] = (
    Probe(task=TASK, seed=0),
    Sft(task=TASK, lr=1, seed=0),
    LmEval(tasks={"t": HarnessTask(pinned=HARNESS_TASK)}),
)
COLUMNS = (
    *(Column(spec.kind, metric) for spec in OF_MODELS for metric in spec.metrics(CORPUS)),
    *(Column(spec.kind, metric, "t") for spec in OF_TASKS for metric in spec.metrics(CORPUS)),
    *(mean.column for mean in MEANS),
)
