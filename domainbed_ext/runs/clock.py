"""How long a run has left, from the steps and evaluations that it has behind it in this attempt."""

from domainbed_ext.runs.setup import Setup

FORWARD = 1 / 3  # of the time of an image in training, which evaluating one takes: as long as nothing else tells


class RunTime:
    """The time of a run's steps and evaluations.

    Args:
        setup: Parts of the run.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.validation = _images(setup, setup.validation_splits)
        self.others = _images(setup, setup.other_splits)
        self._batch = len(setup.train_envs) * int(setup.hparams["batch_size"])
        self._warm = False
        self._seconds, self._steps = 0.0, 0
        self._image: float | None = None

    def step(self, seconds: float) -> None:
        """Takes note of a training step; the first one only warms up."""
        if self._warm:
            self._seconds, self._steps = self._seconds + seconds, self._steps + 1
        self._warm = True

    def evaluation(self, seconds_an_image: float | None) -> None:
        """Takes note of how fast evaluation is; None if nothing was evaluated yet."""
        self._image = seconds_an_image

    def left(self, steps_done: int) -> float | None:
        """Seconds that the rest takes; None as long as nothing tells.

        Args:
            steps_done: Number of steps that are done.
        """
        if not self._steps:
            return None
        step = self._seconds / self._steps
        image = step / self._batch * FORWARD if self._image is None else self._image
        return (self.setup.steps - steps_done) * step + image * self._images_left(steps_done)

    def _images_left(self, steps_done: int) -> int:
        steps, frequency = self.setup.steps, self.setup.checkpoint_freq
        if steps_done >= steps:
            return 0
        last = steps - 1
        times = last // frequency - (steps_done - 1) // frequency + (last % frequency > 0) if frequency else 1
        full = times if self.setup.args.evaluate == "all" else 1  # the last, and who knows which others
        return times * self.validation + full * self.others


def _images(setup: Setup, splits: list[str]) -> int:
    return sum(len(setup.evaluated(name)) for name in splits)
