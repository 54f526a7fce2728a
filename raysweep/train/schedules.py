"""How the learning rate goes over steps. To add a schedule: a spec with `multiplier`, and its name in the last line."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from raysweep.spec import Spec

Fraction = Annotated[float, Field(ge=0, le=1)]


class Warmup(Spec):
    """What all schedules share: a linear rise over the first part of the steps."""

    warmup: Fraction = 0.05
    """Fraction of all steps."""

    def multiplier(self, step: int, num_steps: int) -> float:
        """Factor on the peak learning rate.

        With W = round(warmup x num_steps): (step + 1) / W while step < W, so that the first step moves and the peak is
        reached at step W - 1; then as the schedule goes.

        Args:
            step: from 0 to num_steps - 1.
            num_steps: over which the schedule goes.

        >>> [WSD(name="wsd", warmup=0.25, decay=0.5).multiplier(step, 8) for step in range(8)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
        >>> [round(Cosine(warmup=0.0, final=0.1).multiplier(step, 4), 3) for step in range(4)]
        [1.0, 0.868, 0.55, 0.232]
        """
        warmup_steps = round(self.warmup * num_steps)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return self._after(step - warmup_steps, max(1, num_steps - warmup_steps))

    def _after(self, step: int, num_steps: int) -> float:
        """The factor at `step` of the `num_steps` that follow the warm-up, both counted from its end."""
        raise NotImplementedError


class Constant(Warmup):
    """Warm-up, then the peak rate to the end."""

    name: Literal["constant"]
    """Which schedule."""

    def _after(self, step: int, num_steps: int) -> float:
        return 1.0


class Cosine(Warmup):
    """Warm-up, then half a cosine down to `final` of the peak (Loshchilov and Hutter, 2017, without restarts)."""

    name: Literal["cosine"] = "cosine"
    """Which schedule."""
    final: Fraction = 0.1
    """Part of the peak rate that is left at the end, one step after the last."""

    def _after(self, step: int, num_steps: int) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


class WSD(Warmup):
    """Warm-up, the peak, then a linear decay to `final` over the last `decay` of all steps (Hu et al., 2024)."""

    name: Literal["wsd"]
    """Which schedule."""
    decay: Fraction = 0.2
    """Fraction of all steps over which the rate falls, at the end."""
    final: Fraction = 0.0
    """Part of the peak rate that is left at the end, one step after the last."""

    def multiplier(self, step: int, num_steps: int) -> float:
        """The lower of the warm-up's factor and final + (1 - final) (num_steps - step) / (decay x num_steps)."""
        left = (num_steps - step) / max(1.0, self.decay * num_steps)
        decayed = self.final + (1 - self.final) * min(1.0, left)
        return min(super().multiplier(step, num_steps), decayed)

    def _after(self, step: int, num_steps: int) -> float:
        return 1.0


Schedule = Annotated[Constant | Cosine | WSD, Field(discriminator="name")]
