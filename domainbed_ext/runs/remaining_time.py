"""How long the rest of a run takes, from the steps and evaluations that this attempt has done."""

from domainbed_ext.runs.setup import Setup

FORWARD = 1 / 3  # time of evaluating an image, relative to training on it: an estimate until one is measured


class RemainingTime:
    """Estimates the remaining time of a run.

    Args:
        setup: Parts of the run.

    Attributes:
        validation: Number of images that every evaluation takes.
        others: Number of images that only an evaluation on all splits takes too.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.validation = _count_images(setup, setup.validation_splits)
        self.others = _count_images(setup, setup.other_splits)
        self._judges = setup.make_average().judges
        self._batch = setup.images_a_step
        self._warm = False
        self._seconds, self._steps = 0.0, 0
        self._measured: float | None = None

    def note_step(self, seconds: float) -> None:
        """Takes note of a training step; the first one only warms up."""
        if self._warm:
            self._seconds, self._steps = self._seconds + seconds, self._steps + 1
        self._warm = True

    def note_evaluation(self, seconds_an_image: float | None) -> None:
        """Takes note of how fast evaluation is; None if nothing was evaluated yet."""
        self._measured = seconds_an_image

    def estimate(self, steps_done: int) -> float | None:
        """Estimates the seconds that the rest takes; None as long as it is unknown.

        Args:
            steps_done: Number of steps that are done.
        """
        if not self._steps:
            return None
        image = self._seconds_an_image
        assert image is not None
        step = self._seconds / self._steps
        return (self.setup.steps - steps_done) * step + image * self.count_images(steps_done)

    def estimate_evaluation(self, steps_done: int) -> float | None:
        """Estimates the seconds that the evaluations still to come take; None as long as it is unknown.

        Args:
            steps_done: Number of steps that are done.
        """
        image = self._seconds_an_image
        return None if image is None else image * self.count_images(steps_done)

    @property
    def _seconds_an_image(self) -> float | None:
        """Of evaluation: measured, else estimated from the steps."""
        if self._measured is None and self._steps:
            return self._seconds / self._steps / self._batch * FORWARD
        return self._measured

    def count_evaluations(self, steps_done: int) -> int:
        """Counts the evaluations that are still to come.

        Args:
            steps_done: Number of steps that are done and evaluated, where they are to be.
        """
        return self.setup.count_evaluations(steps_done)

    def count_images(self, steps_done: int) -> int:
        """Counts the images that are still to be evaluated, at most.

        Args:
            steps_done: Number of steps that are done and evaluated, where they are to be.
        """
        times = self.count_evaluations(steps_done)
        if self._judges:  # once more after the last step: the average, on all splits
            return times * self.validation + (self.validation + self.others) * (times > 0)
        # Lean evaluation takes all splits of the last step and of the best, which may be the same.
        full = times if self.setup.args.evaluate == "all" else min(self.count_evaluations(0), 2) * (times > 0)
        return times * self.validation + full * self.others


def _count_images(setup: Setup, splits: list[str]) -> int:
    return sum(len(setup.evaluated(name)) for name in splits)
