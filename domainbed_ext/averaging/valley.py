"""Where SWAD's average starts and ends (Cha et al. 2021): the first valley of the validation loss.

A run is cut into segments at its evaluations; the loss of a segment is that of the weights at its end. The valley
begins at a minimum: a loss that is the lowest of `optimum_patience` losses, of which it is the first. It ends where
`overfit_patience` losses in a row are above a threshold: `tolerance` times the mean of the losses around the minimum.

The segments are those of the published code. Where `overfit_patience` is the larger one, as by default, the valley
reaches back before the minimum, to the last loss above the threshold; where a valley is found before there are
`overfit_patience` losses, or shortly before the run ends, it may reach back further. The published code counts some
segments more than once, mostly that of the minimum; here each counts once, as in the paper.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class LossValley:
    """The valley of a validation loss, as it is found from one evaluation to the next.

    Attributes:
        optimum_patience: Number of losses, the first of which has to be the lowest (N_s).
        overfit_patience: Number of losses in a row above the threshold that end the valley (N_e).
        tolerance: Threshold relative to the mean loss around the minimum (r).
        losses: Losses so far, one of each segment; those after the end of the valley are left out.
        threshold: Highest loss in the valley; None until the valley is found.
        has_ended: Whether the valley has ended, so that no later segment belongs to it.
    """

    optimum_patience: int
    overfit_patience: int
    tolerance: float
    losses: list[float] = field(default_factory=list, init=False)
    threshold: float | None = field(default=None, init=False)
    has_ended: bool = field(default=False, init=False)
    _lowest: int = field(default=0, init=False)
    _inside: set[int] = field(default_factory=set, init=False)

    @property
    def is_found(self) -> bool:
        """Whether the valley has begun."""
        return self.threshold is not None

    @property
    def segments(self) -> list[int]:
        """The indices of the segments in the valley, if the run ended now; none if there is no valley yet."""
        inside = self._inside | set(self._rest())
        return sorted(inside) if inside or not self.is_found else [self._lowest]

    @property
    def undecided(self) -> set[int]:
        """The indices of the segments that may be in the valley in the end, and are not for sure."""
        if self.has_ended:
            return set(self.segments) - self._inside
        patience = max(self.optimum_patience, self.overfit_patience)
        recent = set(range(max(0, len(self.losses) - patience), len(self.losses)))
        return (recent | set(self.segments)) - self._inside

    def add(self, loss: float) -> list[int]:
        """Takes the loss of the next segment.

        Args:
            loss: Validation loss of the weights at its end; one that is not finite is above any threshold.

        Returns:
            Indices of segments that are in the valley for sure from now on; all were `undecided`, or are this one.
        """
        if self.has_ended:
            return []
        self.losses.append(loss if math.isfinite(loss) else math.inf)
        found = self._slide() if self.is_found else self._begin()
        added = sorted(set(found) - self._inside)
        self._inside.update(added)
        return added

    def _begin(self) -> Iterable[int]:
        """Looks for the minimum; returns the segments that are in the valley where it is found."""
        first = len(self.losses) - self.optimum_patience
        window = self.losses[max(first, 0) :]
        if first < 0 or window[0] > min(window) or math.isinf(max(window)):
            return []
        self._lowest, self.threshold = first, self.tolerance * (sum(window) / len(window))
        earlier = self.overfit_patience - self.optimum_patience
        if earlier <= 0:
            return range(first + 1, first + 1 - earlier)
        before = self._overfit_window()[: earlier + 1]
        above = [index for index in before if self.losses[index] > self.threshold]
        # The weights of a segment lie between two losses, both of which have to be in the valley.
        return range((above[-1] if above else before[0] - 1) + 2, before[-1] + 1)

    def _slide(self) -> Iterable[int]:
        """Moves the overfit window by a segment; returns the one that it begins with, unless the valley has ended."""
        window = self._overfit_window()
        if window[0] < self._lowest:
            return []
        if self._is_above(window):
            self.has_ended = True
            return []
        return [window[0]]

    def _rest(self) -> Iterable[int]:
        """The segments that a run adds that ends within the valley: up to the last loss below the threshold."""
        if not self.is_found or self.has_ended:
            return []
        rest = self._overfit_window()[1:]
        return [index for index in rest if not self._is_above(range(index, rest.stop))]

    def _overfit_window(self) -> range:
        return range(max(0, len(self.losses) - self.overfit_patience), len(self.losses))

    def _is_above(self, indices: range) -> bool:
        assert self.threshold is not None
        return min(self.losses[index] for index in indices) > self.threshold
