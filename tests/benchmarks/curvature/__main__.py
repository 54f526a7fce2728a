"""All benchmarks of curvature, one after another; prints a Markdown table for RESULTS.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import coverage
import ghost_norms
import products
import torch
import trace_cost
import workers

if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| what | result |\n| --- | --- |")
    for module in (products, trace_cost, ghost_norms, workers, coverage):
        for what, result in module.main():
            print(f"| {what} | {result} |", flush=True)
