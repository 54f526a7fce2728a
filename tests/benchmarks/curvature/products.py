"""Bar 1: time and memory of Hessian-vector products, in gradients, beside curvlinops and PyHessian. One thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from memory import peak_of_tensors
from peers import Curvlinops, PyHessian, with_forward_mode
from subjects import STYLES, random_ids

from raysweep.curvature.language import mean_token_loss, prepare
from raysweep.curvature.linear import curvature_operator, flat
from raysweep.curvature.operators import finite_difference_product, gradients_of, inner, named_parameters
from raysweep.curvature.probes import probe_vector

Tensor = torch.Tensor
NUM, LENGTH, SEVERAL, ROUNDS = 8, 128, 8, 9


def cases(build: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """Name -> what is timed; but for gradients, v'Hv of the vectors, with nothing kept from before."""
    model, fused, plain, composed = (build() for _ in range(4))
    for each in (model, plain, with_forward_mode(composed)):
        prepare(each)
    prepare(fused, twice_differentiable=False)
    ids = random_ids(NUM, LENGTH)
    batch = {"input_ids": ids}
    parameters = named_parameters(model)
    vectors = [probe_vector(parameters, seed=0, probe=index) for index in range(SEVERAL)]
    # Each in the layout it is fastest with.
    rows = torch.stack([flat(vector) for vector in vectors])
    block = rows.T.contiguous()
    operator = curvature_operator(model, [batch])

    def dots(products: Tensor) -> list[float]:
        return [float(vector @ product) for vector, product in zip(rows, products.T, strict=False)]

    def ours(num: int) -> list[float]:
        return dots(operator.columns(rows[:num].T))

    def differences() -> list[float]:
        its = named_parameters(fused)
        product = finite_difference_product(lambda: mean_token_loss(fused, batch), its, vectors[0]).product
        return [inner(vectors[0], product)]

    def pyhessian(num: int) -> list[float]:
        peer = PyHessian(plain, ids)
        forms = peer.forms([list(vector.values()) for vector in vectors[:num]])
        peer.close()
        return forms

    def curvlinops(num: int) -> list[float]:
        return dots(Curvlinops(composed, [ids]) @ block[:, :num])

    return {
        "gradient": lambda: gradients_of(mean_token_loss(model, batch), parameters),
        "ours": lambda: ours(1),
        "PyHessian": lambda: pyhessian(1),
        "curvlinops": lambda: curvlinops(1),
        "ours, several": lambda: ours(SEVERAL),
        "PyHessian, several": lambda: pyhessian(SEVERAL),
        "curvlinops, several": lambda: curvlinops(SEVERAL),
        "fused": lambda: gradients_of(mean_token_loss(fused, batch), named_parameters(fused)),
        "differences": differences,
    }


def main() -> list[tuple[str, str]]:
    rows = []
    for style, build in STYLES.items():
        every = cases(build)
        forms = {name: case()[0] for name, case in every.items()}
        truth = forms["PyHessian"]
        agreement = max(abs(forms[name] / truth - 1) for name in forms if "ours" in name or "curvlinops" in name)
        seconds: dict[str, list[float]] = {name: [] for name in every}
        for _ in range(ROUNDS):
            for name, case in every.items():
                began = time.perf_counter()
                case()
                seconds[name].append(time.perf_counter() - began)
        t = {
            name: statistics.median(a / b for a, b in zip(column, seconds["gradient"], strict=True))
            for name, column in seconds.items()
        }
        m = {name: peak_of_tensors(case) / 2**20 for name, case in every.items()}
        what = f"(1) {style}, {NUM} x {LENGTH} tokens"
        rows += [
            (
                f"{what}: one exact product, ours / PyHessian / curvlinops",
                f"{t['ours']:.2f} / {t['PyHessian']:.2f} / {t['curvlinops']:.2f} gradients: "
                f"{t['ours'] / t['PyHessian']:.2f}x PyHessian (bar 1.0), "
                f"{t['ours'] / t['curvlinops']:.2f}x curvlinops (bar 0.9); v'Hv agree to {agreement:.0e}",
            ),
            (
                f"{what}: each of {SEVERAL} products, ours / PyHessian / curvlinops",
                " / ".join(f"{t[f'{who}, several'] / SEVERAL:.2f}" for who in ("ours", "PyHessian", "curvlinops"))
                + " gradients (bar 2.2)",
            ),
            *(
                (
                    f"{what}: peak memory of {num}, ours / PyHessian / curvlinops",
                    f"{m[ours]:.0f} / {m[left]:.0f} / {m[right]:.0f} MiB: "
                    f"{m[ours] / min(m[left], m[right]):.2f}x the better (bar 0.8)",
                )
                for num, (ours, left, right) in (
                    (1, ("ours", "PyHessian", "curvlinops")),
                    (SEVERAL, ("ours, several", "PyHessian, several", "curvlinops, several")),
                )
            ),
            (
                f"{what}: finite differences, fused attention",
                f"{t['differences']:.2f} gradients (bar 2.05), {t['differences'] / t['fused']:.2f} of those by fused "
                f"attention; peak {m['differences']:.0f} MiB, {m['fused']:.0f} of a gradient",
            ),
        ]
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    for row in main():
        print(*row, sep=": ")
