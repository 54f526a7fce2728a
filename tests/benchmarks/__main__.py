"""All benchmarks but the curvature's, one after another; prints a Markdown table for RESULTS.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import exact_languages
import first_step
import gang_overhead
import plan_speed
import prepare_throughput
import pretrain_throughput
import sampling
import score_coverage
import tokenizing

if __name__ == "__main__":
    print("| what | result |\n| --- | --- |")
    modules = (
        *(gang_overhead, pretrain_throughput, first_step, plan_speed, score_coverage),
        *(prepare_throughput, exact_languages, sampling, tokenizing),
    )
    for module in modules:
        for what, result in module.main():
            print(f"| {what} | {result} |", flush=True)
