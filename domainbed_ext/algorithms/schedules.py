"""How learning rates change over a run: one factor for all parameter groups, a function of the step alone.

So a run that resumes needs no state of it. The rate of a step is a group's own rate times `Schedule.factor`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "linear": lambda share: 1 - share,
}
"""The factor after the warm-up by name, a function of the share of the remaining steps that is done."""


@dataclass(frozen=True)
class Schedule:
    """The learning rates of a run.

    Attributes:
        name: Name in `SCHEDULES`.
        warmup: Share of the steps in which the rate rises linearly, before the schedule begins.
        steps: Number of training steps.
    """

    name: str
    warmup: float
    steps: int

    @classmethod
    def of(cls, hparams: Mapping[str, Any], steps: int) -> "Schedule":
        """Returns the schedule of a run.

        Args:
            hparams: Hyperparameters of the run; records of earlier versions have none of a schedule.
            steps: Number of training steps.
        """
        return cls(hparams.get("schedule", "constant"), hparams.get("warmup", 0.0), steps)

    @property
    def is_constant(self) -> bool:
        """Whether all steps have the same rate."""
        return self.name == "constant" and not self.warmup

    def factor(self, step: int) -> float:
        """Computes what the learning rates of a step are multiplied by: above 0, and at most 1.

        Args:
            step: Index of the step, from 0 on.
        """
        rising = min(round(self.warmup * self.steps), self.steps)
        if step < rising:
            return (step + 1) / (rising + 1)
        return SCHEDULES[self.name]((step - rising) / (self.steps - rising))
