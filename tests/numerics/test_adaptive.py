"""The arithmetic of a trace to a target error: unbiased, its errors honest, its rounds a function of values alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build

from raysweep.curvature import measure
from raysweep.curvature.adaptive import fisher_order, next_units, probe_order, stop_reason
from raysweep.curvature.averages import Estimate, Moments, summarize
from raysweep.curvature.groups import can_be_joined, cheapest_size
from raysweep.curvature.language import prepare
from raysweep.curvature.measure import measure_traces, one_after_another, paired_difference
from raysweep.curvature.operators import MovableParameters, named_parameters
from raysweep.curvature.settings import TraceSettings
from raysweep.curvature.units import Unit, Values


class Synthetic:
    """Units of a model that is never built: text makes batches differ, probes and draws add noise of their own."""

    def __init__(self, seed: int, *, residual: float, num_batches: int = 2000) -> None:
        self.draw = np.random.default_rng(seed)
        # Of skewed spread, as the traces of texts are; the mean of each is known.
        self.text = self.draw.gamma(4.0, 0.25, size=num_batches)
        self.bent = self.draw.normal(0.1, 1.0, size=num_batches) * residual
        self.truth = 100 * (self.text.mean() + self.bent.mean())
        self.num_batches = num_batches
        self.tokens = 127.0

    def values(self, unit: Unit) -> Values:
        noise = np.random.default_rng([unit.batch, unit.draw, unit.kind == "probe", int(self.text[0] * 1e6)])
        scale = self.tokens * 100
        trace = scale * self.text[unit.batch]
        if unit.kind == "fisher":
            return {"num_tokens": self.tokens, "fisher": trace * noise.gamma(8.0, 1 / 8), "parameter/w": trace}
        return {
            "num_tokens": self.tokens,
            "gauss_newton": trace * noise.gamma(8.0, 1 / 8),
            "residual": scale * (self.bent[unit.batch] + noise.normal(0, 0.3)),
        }

    def run(self, settings: TraceSettings) -> dict[Unit, Values]:
        done: dict[Unit, Values] = {}
        while units := next_units(done, self.num_batches, settings):
            done |= {unit: self.values(unit) for unit in units}
        return done


@pytest.mark.parametrize("residual", [0.0, 2.0])
def test_intervals_cover_the_truth_and_estimates_are_unbiased(residual):
    inside, errors, sigmas, runs = 0, [], [], 200
    rse = 0.05 if residual < 1 else 0.1
    for seed in range(runs):
        made = Synthetic(seed, residual=residual)
        traces = summarize(made.run(TraceSettings(rse=rse, max_units=1024)))
        low, high = traces.hessian.relative_interval()
        inside += low <= made.truth <= high
        errors.append((traces.hessian.mean - made.truth) / made.truth)
        sigmas.append(traces.hessian.rse)
    # A standard error of 1.5 %.
    assert 0.92 <= inside / runs <= 0.98
    # To stop at a *relative* error prefers large means a little: by the order of its square.
    assert abs(np.mean(errors)) < 4 * np.std(errors) / math.sqrt(runs) + rse**2
    assert np.std(errors) == pytest.approx(np.sqrt(np.mean(np.square(sigmas))), rel=0.15)


def test_fisher_draws_are_worth_more_where_the_residual_is_small():
    weights = []
    for residual in (0.0, 2.0):
        done = Synthetic(3, residual=residual, num_batches=20_000).run(
            TraceSettings(rse=0.03, max_units=4000, products="exact")
        )
        num = [sum(unit.kind == kind for unit in done) for kind in ("fisher", "probe")]
        weights.append(num[0] / num[1])
    assert weights[0] > 1.5 * weights[1]


def test_probe_and_data_variance_are_told_apart():
    # Text alone: v'Hv is the same for any probe. Then probes alone: all texts are alike.
    for part in ("data", "probe"):
        made = Synthetic(0, residual=0.0)
        if part == "data":
            done = {
                u: v | {"gauss_newton": 1e4 * made.text[u.batch], "residual": 0.0} if u.kind == "probe" else v
                for u, v in made.run(TraceSettings(max_units=1024)).items()
            }
        else:
            made.text[:] = 1.0
            made.bent[:] = 0.0
            done = made.run(TraceSettings(max_units=1024))
        traces = summarize(done)
        assert traces.stderr_probe**2 + traces.stderr_data**2 == pytest.approx(traces.hessian.stderr**2)
        if part == "data":
            assert traces.stderr_probe < 0.05 * traces.hessian.stderr
        else:
            # Of four repeated batches: a rough figure.
            assert traces.stderr_probe > 0.3 * traces.hessian.stderr


def test_neither_part_of_an_error_is_known_without_a_second_draw():
    values = {batch: {"num_tokens": 10.0, "gauss_newton": 1.0 + batch, "residual": 0.0} for batch in range(4)}
    traces = summarize({Unit("probe", batch, 0): each for batch, each in values.items()})
    assert traces.hessian.stderr > 0
    assert np.isnan([traces.stderr_probe, traces.stderr_data]).all()


def test_more_text_is_asked_for_when_its_own_variance_is_too_large():
    made = Synthetic(1, residual=0.0, num_batches=12)
    done = made.run(TraceSettings(rse=0.001, max_units=1024))
    assert stop_reason(done, 12, TraceSettings(rse=0.001, max_units=1024)) == "text"
    assert len(done) < 200


def test_a_budget_ends_it():
    settings = TraceSettings(rse=1e-4, min_units=16, max_units=40)
    done = Synthetic(1, residual=0.5).run(settings)
    assert stop_reason(done, 2000, settings) == "units"
    assert max(sum(unit.kind == kind for unit in done) for kind in ("fisher", "probe")) == 40


@given(st.integers(1, 40), st.integers(0, 200))
def test_orders_give_every_unit_once(num_batches, count):
    for order in (probe_order, fisher_order):
        units = [order(index, num_batches) for index in range(count)]
        assert len(set(units)) == count
        assert all(0 <= unit.batch < num_batches for unit in units)
        seen = [sum(unit.batch == batch for unit in units) for batch in range(num_batches)]
        # Evenly, but for those that come twice at first.
        assert max(seen, default=0) - min(seen, default=0) <= 2


def test_uneven_batches_are_weighted_by_their_tokens():
    done: dict[Unit, Values] = {
        Unit("probe", batch, 0): {"num_tokens": n, "gauss_newton": 3.0 * n, "residual": batch * n}
        for batch, n in enumerate((10.0, 30.0, 20.0))
    }
    done |= {Unit("fisher", batch, 0): {"num_tokens": 10.0, "fisher": 30.0, "parameter/w": 30.0} for batch in range(3)}
    traces = summarize(done)
    assert traces.hessian.mean == pytest.approx(3 + (30 + 40) / 60)
    assert traces.num_tokens == 60


@pytest.mark.parametrize(("num_batches", "why"), [(2000, "units"), (12, "text")])
def test_without_draws_none_are_taken_for_the_fisher_trace_either(num_batches, why):
    # The two parts of v'Hv cancel, so that the Hessian's trace is known long before the Fisher's.
    done: dict[Unit, Values] = {}
    settings = TraceSettings(rse=0.02, min_units=12, max_units=60)
    while units := next_units(done, num_batches, settings):
        for unit in units:
            noise = 300 * np.random.default_rng([unit.batch, unit.draw]).normal()
            done[unit] = {"num_tokens": 10.0, "gauss_newton": 1000 + noise, "residual": -0.9 * noise}
    traces = summarize(done)
    assert traces.hessian.rse < 0.02 < traces.fisher.rse
    assert stop_reason(done, num_batches, settings) == why
    assert {unit.kind for unit in done} == {"probe"}


def test_the_error_of_differences_grows_with_how_far_a_probe_reaches():
    checked = {"num_tokens": 10.0, "gauss_newton": 100.0, "residual": 0.0, "gauss_newton_2h": 100.0, "residual_2h": 3.0}
    done = {Unit("probe", 0, 0): checked, Unit("probe", 1, 0): checked}
    assert summarize(done).difference_error == pytest.approx(1 / 100)
    done[Unit("probe", 2, 0)] = {"num_tokens": 10.0, "gauss_newton": 50.0, "residual": 0.0}
    assert summarize(done).difference_error == pytest.approx(1 / 100)
    done[Unit("probe", 2, 0)] = {"num_tokens": 10.0, "gauss_newton": 1000.0, "residual": 0.0}
    assert summarize(done).difference_error == pytest.approx((100 + 100 + 10 * 1000) / 100 / 1200)


def test_an_estimate_gives_students_interval():
    low, high = Estimate(10.0, 1.0, 4).interval()
    assert (low, high) == pytest.approx((10 - 2.776, 10 + 2.776), abs=1e-3)


def tiny_batches(model, num: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(0, model.config.vocab_size, (1, 8), generator=draw)} for _ in range(num)]


@pytest.mark.parametrize("level", ["parameter", "layer", "block"])
def test_parts_add_up_to_the_label_draws(level):
    model = build("llama")
    prepare(model)
    settings = TraceSettings(rse=0.5, min_units=4, max_units=8)
    measured = measure_traces(model, tiny_batches(model, 20), settings.with_(parts=True))
    draws = [values for unit, values in measured.units.items() if unit.kind == "fisher"]
    assert len(draws) >= 4
    whole = sum(values["fisher"] for values in draws) / sum(values["num_tokens"] for values in draws)
    assert sum(part.fisher.mean for part in measured.parts(level).values()) == pytest.approx(whole)
    with pytest.raises(ValueError, match="two at least"):
        measure_traces(model, tiny_batches(model, 20), settings).parts(level)


def test_an_interrupted_measurement_goes_on_to_the_bit():
    model = build("llama")
    prepare(model)
    batches, settings = tiny_batches(model, 60), TraceSettings(rse=0.1, max_units=60)
    whole = measure_traces(model, batches, settings)
    saved: dict[Unit, Values] = {}
    computed = []

    def deal(units, run, *, limit):
        for unit in units:
            if unit not in saved:
                if len(computed) == limit:
                    raise KeyboardInterrupt
                computed.append(unit)
                saved[unit] = run(unit)
        return [saved[unit] for unit in units]

    with pytest.raises(KeyboardInterrupt):
        measure_traces(model, batches, settings, deal=lambda units, run: deal(units, run, limit=13))
    resumed = measure_traces(model, batches, settings, deal=lambda units, run: deal(units, run, limit=10**6))
    assert resumed.metrics() == whole.metrics()
    assert resumed.units == whole.units
    # No unit is computed twice; one more than are averaged tells how far the logits move.
    assert len(computed) == len(set(computed)) == len(whole.units) + 1


def test_units_grow_and_nothing_of_the_first_is_lost(monkeypatch):
    monkeypatch.setattr(measure, "cheapest_size", lambda *args, **kwargs: 3)
    model = build("llama")
    prepare(model)
    batches, settings = tiny_batches(model, 40), TraceSettings(rse=0.01, min_units=2, max_units=14)
    computed: list[Unit] = []

    def counted(units, run):
        computed.extend(units)
        return [run(unit) for unit in units]

    grown = measure_traces(model, batches, settings, deal=counted)
    assert grown.unit_batches == 3
    # The units of the first round are filled up, each once; the others are made whole.
    rests = [unit for unit in computed if unit.kind == "rest"]
    assert len(rests) == len(set(rests)) == 10
    assert len(grown.units) == 14
    # What was filled up is what would have been made at once, but for the step of differences.
    fixed = measure_traces(model, batches, settings, unit_batches=3)
    assert fixed.units.keys() == grown.units.keys()
    for unit, values in fixed.units.items():
        assert grown.units[unit]["num_tokens"] == values["num_tokens"] == 7 * 3
        assert grown.units[unit]["gauss_newton"] == pytest.approx(values["gauss_newton"], rel=0.02)
    single = measure_traces(model, batches, settings.with_(max_unit_batches=1))
    assert single.unit_batches == 1
    with pytest.raises(ValueError, match="measure the second with unit_batches of the first"):
        paired_difference(grown, single)
    # Texts of several lengths make no one batch.
    assert not can_be_joined([*batches, {"input_ids": torch.zeros(1, 9, dtype=torch.int64)}])


def test_units_have_the_size_that_makes_the_target_cheapest():
    def size(rsd: float, *, rse: float = 0.05, num_batches: int = 2000, num_tokens: int = 64, **settings) -> int:
        done = {
            Unit("probe", batch, 0): {"num_tokens": 63.0, "gauss_newton": 63 * (1 + way), "residual": 0.0}
            for batch, way in enumerate([rsd, -rsd] * 6)
        }
        given = {"num_batches": num_batches, "num_tokens": num_tokens, "device": "cpu"}
        return cheapest_size(Moments.of(done), TraceSettings(rse=rse, max_units=1024, **settings), **given)

    assert size(0.2) == 1  # 16 single ones do.
    assert size(0.6) == 4  # Of 144, in no fewer than 24 units.
    assert size(0.6, num_batches=90) == 1  # There are not so many.
    assert size(0.6, rse=0.02) == 16
    assert size(0.6, rse=0.02, max_unit_batches=4) == 4
    assert size(0.6, rse=0.02, num_tokens=512) <= 2  # Of long ones the fixed cost is little.
    assert size(3.0, rse=0.01) == 1  # Out of reach of the budget.


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rse": 0.0}, r"rse\n +Input should be greater than 0"),
        ({"rse": -1.0}, "rse"),
        ({"max_units": 1}, r"max_units\n +Input should be greater than or equal to 2"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        TraceSettings(**asked)


def test_arguments_are_checked_before_anything_is_computed():
    model = build("llama")
    prepare(model)
    batches = tiny_batches(model, 4)
    with pytest.raises(ValueError, match="'logit_differences', 'gradient_differences' or 'exact'"):
        measure_traces(model, batches, TraceSettings(products="hessian"))
    with pytest.raises(ValueError, match="a batch is a mapping with input_ids"):
        measure_traces(model, [batch["input_ids"] for batch in batches], TraceSettings())


def test_one_batch_has_no_error_bar():
    model = build("llama")
    with pytest.raises(ValueError, match="at least two batches; there are 1"):
        measure_traces(model, tiny_batches(model, 1), TraceSettings())


def test_differences_share_probes_and_have_a_small_error_of_their_own():
    left = build("llama")
    right = build("llama")
    with torch.no_grad():
        for parameter in right.parameters():
            parameter.mul_(1.02)
    for model in (left, right):
        prepare(model)
    batches, settings = tiny_batches(left, 80), TraceSettings(rse=0.1, max_units=80)
    ours, theirs = (measure_traces(model, batches, settings) for model in (left, right))
    difference = paired_difference(ours, theirs)
    both = math.hypot(ours.traces.fisher.stderr, theirs.traces.fisher.stderr)
    assert difference.fisher.stderr < both
    assert difference.hessian.stderr < math.hypot(ours.traces.hessian.stderr, theirs.traces.hessian.stderr) / 3
    plain = ours.traces.gauss_newton.mean - theirs.traces.gauss_newton.mean
    assert abs(difference.gauss_newton.mean - plain) < both
    known = [each.traces.difference_error * abs(each.traces.hessian.mean) for each in (ours, theirs)]
    assert difference.difference_error == pytest.approx(sum(known) / abs(difference.hessian.mean))
    with pytest.raises(ValueError, match="share no units"):
        paired_difference(ours, replace(theirs, units={}))
    longer = {unit: {**values, "num_tokens": 9.0} for unit, values in theirs.units.items()}
    with pytest.raises(ValueError, match="is not the same text in both"):
        paired_difference(ours, replace(theirs, units=longer))


def test_the_step_is_made_smaller_until_its_error_is():
    # Weights this large bend the loss within the first step that is tried.
    model = build("gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    prepare(model)
    batches = tiny_batches(model, 40)
    taken = []

    def deal(units, run):
        taken.extend(unit for unit in units if unit.kind == "step")
        return one_after_another(units, run)

    settings = TraceSettings(rse=0.05, min_units=16, max_units=40)
    found = measure_traces(model, batches, settings, deal=deal)
    assert 2 < len(taken) <= 8
    exact = measure_traces(model, batches, settings.with_(products="exact"))
    scale = abs(exact.traces.gauss_newton.mean)
    assert abs(found.traces.gauss_newton.mean - exact.traces.gauss_newton.mean) < 0.02 * scale
    off = []
    for unit in found.units.keys() & exact.units.keys():
        if unit.kind == "probe":
            mine, theirs = (
                values["gauss_newton"] + values["residual"] for values in (found.units[unit], exact.units[unit])
            )
            off.append(abs(mine - theirs) / (scale * exact.units[unit]["num_tokens"]))
    # Probe by probe, not only on average.
    assert sorted(off)[len(off) // 2] < 0.02


def test_probes_of_one_batch_share_the_pass_at_the_weights():
    model = build("llama")
    prepare(model)
    passes = []
    handle = model.register_forward_hook(lambda *args: passes.append(1))
    found = measure_traces(model, tiny_batches(model, 20), TraceSettings(rse=0.9, min_units=2, max_unit_batches=1))
    handle.remove()
    assert found.traces.num_probes == 10
    # Probes of eight batches, two of them with a second one, ahead and behind; ahead for the response, and twice as far
    # to both sides on two batches for the step; at the weights each batch once.
    assert len(passes) == 2 * 10 + 1 + 2 * 2 + 8


def step_that_is_found(forms):
    """With forms(step, sign), v'Gv and v'(H - G)v of a batch, in place of a model's; and the first step tried."""
    model = build("llama")
    movable = MovableParameters(named_parameters(model), math.nan)
    steps = []

    def deal(units, run):
        made = []
        for unit in units:
            sign = 1 - 2 * (unit.batch % 2)
            fine, coarse = forms(movable.step, sign), forms(2 * movable.step, -sign)
            made.append({"num_tokens": 10.0, "gauss_newton": 1000.0, "residual": 0.0})
            if unit.kind == "step":
                made[-1] = {"num_tokens": 10.0, "gauss_newton": fine[0], "residual": fine[1]}
                made[-1] |= {"gauss_newton_2h": coarse[0], "residual_2h": coarse[1]}
                steps.append(movable.step)
        return made

    measure_traces(model, tiny_batches(model, 20), TraceSettings(rse=0.05), deal=deal, movable=movable)
    return movable.step, steps


def test_a_step_between_truncation_and_rounding_is_found():
    # The residual is wrong by 1e9 h^2 of truncation and 1e-5 / h^2 of rounding: equal at h = 3.2e-4, by 100 each.
    step, steps = step_that_is_found(lambda h, sign: (1000.0, 1e9 * h**2 + sign * 1e-5 / h**2))
    assert steps[0] > 6e-4
    assert 2e-4 < step < 5e-4


def test_a_step_too_long_for_the_logits_to_follow_is_not_taken_for_one_too_short():
    # Logits bend away within 1e-5: beyond, v'Gv is far too small, at any step and at twice of it alike.
    step, steps = step_that_is_found(lambda h, sign: (1000.0 / (1 + (h / 1e-5) ** 2), 0.0))
    assert steps[0] > 6e-4
    assert step < 2e-6


def test_probes_that_reach_further_than_those_the_step_was_chosen_on_are_told(caplog):
    # Attention this sharp bends a thousand times more along some probes.
    model = build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    prepare(model)
    batches, settings = tiny_batches(model, 40), TraceSettings(rse=0.05, min_units=16, max_units=40)
    found, exact = (
        measure_traces(model, batches, settings.with_(products=products)) for products in ("logit_differences", "exact")
    )
    assert abs(found.traces.gauss_newton.mean / exact.traces.gauss_newton.mean - 1) > 0.5
    assert found.traces.difference_error > 0.5
    assert "finite differences are off" in caplog.text
