"""What a training curve tells by its shape alone, without a model."""

import json

import numpy as np
import pytest
from columns import CORPUS

from raysweep.objectives.causal_lm import CausalLM
from raysweep.stages.base import Subject
from raysweep.stages.curve import Curve, fit_parabola
from raysweep.stages.pretrain import CURVE
from raysweep.worker import Worker


def run(folder, losses, **given):
    lines = [{"step": step, "loss_nats_per_token": loss} for step, loss in enumerate(losses, start=1)]
    (folder / CURVE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Curve(**given).run({"checkpoint": folder}, folder, Worker())


def test_slope_and_curvature_are_those_of_least_squares_on_the_last_steps(tmp_path):
    generator = np.random.default_rng(0)
    steps = np.log(np.arange(1, 201))
    losses = 5 - steps + 0.1 * steps**2 + 0.01 * generator.normal(size=200)
    found = run(tmp_path, losses)
    assert found["slope"] == pytest.approx(np.polyfit(steps[100:], losses[100:], 1)[0])
    assert found["curvature"] == pytest.approx(2 * np.polyfit(steps[100:], losses[100:], 2)[0])
    assert found["slope"] == pytest.approx(-1 + 0.2 * 5.0, abs=0.05)
    assert run(tmp_path, losses, part=1.0)["slope"] == pytest.approx(np.polyfit(steps, losses, 1)[0])


def test_a_phase_is_looked_at_by_itself(tmp_path):
    """The text of a phase may be an easier one: what came before is another loss."""
    steps = np.log(np.arange(1, 101))
    losses = np.where(np.arange(100) < 60, 9.0, 5 - 2 * steps)
    spec = Curve(part=1.0).bind(Subject(CORPUS, CausalLM(), 33, tasks={}, trained_by=CausalLM(), steps_before=60))
    assert run(tmp_path, losses, part=1.0, steps_before=spec.steps_before)["slope"] == pytest.approx(-2)
    assert spec.loss_of == CausalLM()


def test_without_a_curve_or_with_a_few_steps_there_is_no_number(tmp_path):
    names = {metric.name for metric in Curve().metrics(CORPUS)}
    for found in (Curve().run({"checkpoint": tmp_path}, tmp_path, Worker()), run(tmp_path, np.arange(7.0))):
        assert found.keys() == names
        assert np.isnan(list(found.values())).all()


@pytest.mark.parametrize(("memory", "low", "high"), [(0.0, 0.9, 1.1), (0.5, 0.75, 0.95)])
def test_errors_are_what_slopes_of_equal_curves_differ_by(memory, low, high):
    """Of 400 curves: a standard deviation is known to 3.5 %, and the mean of squared errors to less than that.

    Plain least squares would say 0.58 of it where steps depend on each other.
    """
    generator = np.random.default_rng(1)
    x = np.log(np.arange(151, 401))
    noise = generator.normal(size=(400, 250))
    for step in range(1, 250):
        noise[:, step] += memory * noise[:, step - 1]
    fits = np.array([fit_parabola(x, 4 - x + each) for each in noise])
    for value, error in ((0, 1), (2, 3)):
        assert low < np.sqrt((fits[:, error] ** 2).mean()) / fits[:, value].std() < high
