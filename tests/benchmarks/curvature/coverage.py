"""Bar 5: how often the stated 95 % interval holds the exact trace, over runs that differ in text, probes and draws."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raysweep.curvature.language import mean_token_loss, prepare
from raysweep.curvature.measure import measure_traces
from raysweep.curvature.operators import hessian_vector_products, named_parameters
from raysweep.curvature.settings import TraceSettings

Tensor = torch.Tensor
RUNS, VOCAB, LENGTH, POPULATION, STEPS = 500, 24, 16, 384, 400


def text() -> Tensor:
    """Sequences of a random Markov chain: the text is these, so the mean over all of them is the truth."""
    draw = torch.Generator().manual_seed(0)
    chain = torch.randn(VOCAB, VOCAB, generator=draw).mul(1.5).softmax(-1)
    ids = torch.randint(VOCAB, (POPULATION, 1), generator=draw)
    for _ in range(LENGTH - 1):
        ids = torch.cat([ids, torch.multinomial(chain[ids[:, -1]], 1, generator=draw)], dim=1)
    return ids


def main() -> list[tuple[str, str]]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    ids = text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        optimizer.zero_grad()
        mean_token_loss(model, {"input_ids": ids[torch.arange(32).add(32 * step) % POPULATION]}).backward()
        optimizer.step()
    prepare(model)
    truth = exact_trace(model, ids)
    inside = reached = 0
    units: list[int] = []
    for run in range(RUNS):
        rows = torch.randint(POPULATION, (512,), generator=torch.Generator().manual_seed(run))
        batches = [{"input_ids": ids[pair]} for pair in rows.split(2)]
        measured = measure_traces(model, batches, TraceSettings(rse=0.05, max_units=1024, seed=run))
        low, high = measured.traces.hessian.relative_interval()
        inside += low <= truth <= high
        reached += measured.reason == "reached"
        units.append(measured.traces.num_probes)
    num = sum(parameter.numel() for parameter in model.parameters())
    what = f"(5) 95 % interval holds the exact trace of a Llama of {num:,} parameters, {RUNS} runs to 5 %"
    units.sort()
    return [(what, f"{inside / RUNS:.1%} (bar 93 to 97 %; {reached} reached 5 %, median {units[RUNS // 2]} probes)")]


def exact_trace(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Of the Hessian of the mean loss over all text: one product for each parameter, in float64."""
    double = model.double()
    parameters = named_parameters(double)
    total = 0.0
    nought = {name: torch.zeros_like(part) for name, part in parameters.items()}
    for name, part in parameters.items():
        vectors = []
        for index in range(part.numel()):
            unit = torch.zeros_like(part)
            unit.view(-1)[index] = 1
            vectors.append({**nought, name: unit})
        products = hessian_vector_products(lambda: mean_token_loss(double, {"input_ids": ids}), parameters, vectors)
        total += sum(float(product[name].view(-1)[index]) for index, product in enumerate(products))
    model.float()
    return total


if __name__ == "__main__":
    torch.set_num_threads(1)
    for row in main():
        print(*row, sep=": ")
