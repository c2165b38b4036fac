"""Trackio: a database on this machine, which `trackio show` displays; TRACKIO_SPACE_ID sends it to a Space."""

import os
from collections.abc import Mapping

from domainbed_ext.trackers.base import PROJECT, TrackedRun, Tracker
from domainbed_ext.trackers.registry import register_tracker


@register_tracker("trackio")
class Trackio(Tracker):
    """Logs to a run of Trackio, which a resumed run continues. TRACKIO_PROJECT names the project."""

    PACKAGE = "trackio"

    def __init__(self, run: TrackedRun, last_step: int | None) -> None:
        super().__init__(run, last_step)
        import trackio

        self._finish = trackio.finish
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=f"{run.name}_{run.id}",  # which identifies it
            group=run.group,
            config=dict(run.config),
            resume="allow",
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the numbers."""
        self._run.log(dict(values), step=step)

    def select(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the same below `selected/`, at the selected step."""
        self.log(step, {f"selected/{name}": value for name, value in values.items()})

    def close(self, is_done: bool) -> None:
        """Waits until all is written."""
        self._finish()
