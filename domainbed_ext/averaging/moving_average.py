"""The simple moving average of Arpit et al. (2022), Ensemble of Averages."""

from typing import Any

from domainbed_ext.averaging.base import Average, Moving
from domainbed_ext.averaging.mean import Mean
from domainbed_ext.averaging.window import describe_window, summarise_window


class MovingAverage(Average):
    """The average `ma`: the mean of the weights after all steps from one on. Until then, the present weights.

    Args:
        start: Index of the first step whose weights count.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self._mean = Mean()

    def add(self, step: int, moving: Moving) -> None:
        """Adds the weights of a step."""
        if step >= self.start:
            self._mean.add(moving())

    def mean(self) -> Mean | None:
        """Returns the mean so far."""
        return self._mean if self._mean.count else None

    @property
    def copies(self) -> int:
        """A sum in double precision."""
        return 2

    @property
    def fields(self) -> dict[str, Any]:
        """First and last step of the mean."""
        return {"average": describe_window(self._steps)}

    @property
    def summary(self) -> str:
        """First and last step of the mean."""
        return summarise_window(self._steps)

    @property
    def _steps(self) -> range:
        return range(self.start, self.start + self._mean.count)

    def state_dict(self) -> dict[str, Any]:
        """The mean so far."""
        return self._mean.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the mean."""
        self._mean.load_state_dict(state)
