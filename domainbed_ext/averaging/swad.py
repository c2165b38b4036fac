"""SWAD (Cha et al. 2021): the dense average over the first valley of the validation loss."""

from typing import Any

import torch
from torch import Tensor

from domainbed_ext.averaging.base import Average, Moving
from domainbed_ext.averaging.mean import Mean
from domainbed_ext.averaging.valley import LossValley
from domainbed_ext.averaging.window import describe_window, summarise_window


class Swad(Average):
    """The average `swad`: the mean of the weights after all steps within the valley.

    A valley may reach back, so the means of the last segments are kept on the CPU: as many as the larger patience, at
    most one more. If the loss has no valley, the weights of the last step stand for the average.

    Args:
        valley: Criterion, which has no loss yet.
    """

    judges = True

    def __init__(self, valley: LossValley) -> None:
        self.valley = valley
        self._present, self._inside = Mean(), Mean()
        self._kept: dict[int, dict[str, Tensor]] = {}  # means of segments that the valley has not decided on
        self._ends: list[int] = []  # last step of each segment

    def add(self, step: int, moving: Moving) -> None:
        """Adds the weights of a step to the present segment."""
        self._present.add(moving())

    @property
    def is_judged(self) -> bool:
        """Whether the present segment is empty."""
        return not self._present.count

    def judge(self, loss: float) -> None:
        """Ends the present segment, whose loss this is."""
        self._kept[len(self._ends)] = {name: _narrow(tensor) for name, tensor in self._present.value().items()}
        self._ends.append((self._ends[-1] if self._ends else -1) + self._present.count)
        self._present = Mean()
        for segment in self.valley.add(loss):
            self._inside.add(self._kept[segment], len(self._steps(segment)))
        self._kept = {segment: self._kept[segment] for segment in sorted(self.valley.undecided)}

    @property
    def is_complete(self) -> bool:
        """Whether the valley has ended."""
        return self.valley.has_ended

    def mean(self) -> Mean | None:
        """Returns the mean over the valley, if the run ended now."""
        if not self.valley.is_found:
            return None
        mean = self._inside.copy()
        for segment in self.valley.segments:
            if segment in self._kept:
                mean.add(self._kept[segment], len(self._steps(segment)))
        return mean

    @property
    def copies(self) -> int:
        """Two sums in double precision, and the kept means."""
        return 4 + max(self.valley.optimum_patience, self.valley.overfit_patience) + 1

    @property
    def fields(self) -> dict[str, Any]:
        """First and last step of the mean, and the losses that they follow from."""
        return {
            "average": {
                "converged": self.valley.is_found,
                **describe_window(self._window),
                "threshold": self.valley.threshold,
                "validation_losses": [list(pair) for pair in zip(self._ends, self.valley.losses, strict=True)],
            }
        }

    @property
    def summary(self) -> str:
        """First and last step of the mean."""
        return summarise_window(self._window)

    @property
    def warning(self) -> str:
        """That the loss has no valley."""
        if self.valley.is_found:
            return ""
        return (
            f"average=swad has not converged within {len(self._ends)} validation losses: the weights of the last step "
            "are used; more --steps or a lower --checkpoint_freq may help"
        )

    def state_dict(self) -> dict[str, Any]:
        """Losses, and the means of segments and steps."""
        return {
            "losses": self.valley.losses,
            "ends": self._ends,
            "kept": self._kept,
            "inside": self._inside.state_dict(),
            "present": self._present.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; the valley follows from the losses."""
        for loss in state["losses"]:
            self.valley.add(loss)
        self._ends, self._kept = list(state["ends"]), dict(state["kept"])
        self._inside.load_state_dict(state["inside"])
        self._present.load_state_dict(state["present"])

    def _steps(self, segment: int) -> range:
        return range(self._ends[segment - 1] + 1 if segment else 0, self._ends[segment] + 1)

    @property
    def _window(self) -> list[int]:
        return [step for segment in self.valley.segments for step in self._steps(segment)]


def _narrow(tensor: Tensor) -> Tensor:
    """A mean in single precision on the CPU, where several of them are kept."""
    return tensor.to("cpu", torch.complex64 if tensor.is_complex() else torch.float32)
