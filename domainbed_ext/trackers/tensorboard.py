"""TensorBoard: event files in the run's folder."""

from collections.abc import Mapping

from domainbed_ext.system import strict_json
from domainbed_ext.trackers.base import TrackedRun, Tracker
from domainbed_ext.trackers.registry import register_tracker


@register_tracker("tensorboard")
class TensorBoard(Tracker):
    """Writes scalars to event files, one file for each attempt."""

    PACKAGE = "tensorboard"

    def __init__(self, run: TrackedRun, last_step: int | None) -> None:
        super().__init__(run, last_step)
        from torch.utils.tensorboard import SummaryWriter  # it takes a second, and needs tensorboard

        purge_step = None if last_step is None else last_step + 1
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge_step)
        if last_step is None:
            text = strict_json.dumps(dict(run.config), indent=2)
            self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes each number as a scalar of its name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def select(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the same below `selected/`, at the selected step."""
        self.log(step, {f"selected/{name}": value for name, value in values.items()})

    def close(self, is_done: bool) -> None:
        """Closes the file."""
        self._writer.close()
