"""Weights & Biases: records go to its server, or with WANDB_MODE=offline to files that `wandb sync` sends."""

import os
from collections.abc import Mapping

from domainbed_ext.trackers.base import PROJECT, TrackedRun, Tracker
from domainbed_ext.trackers.registry import register_tracker


@register_tracker("wandb")
class Wandb(Tracker):
    """Logs to a run of W&B, which a resumed run continues. WANDB_PROJECT and WANDB_ENTITY say where."""

    PACKAGE = "wandb"

    def __init__(self, run: TrackedRun, last_step: int | None) -> None:
        super().__init__(run, last_step)
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=run.id,
            name=run.name,
            group=run.group,
            config=dict(run.config),
            dir=str(run.folder),
            resume="allow",
            allow_val_change=True,  # versions, say, of a run that resumes
            settings=wandb.Settings(console="off"),  # what is printed stays in the run's own logs
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the numbers, unless the server has this step already."""
        if step >= self._run.step:
            self._run.log(dict(values), step=step, commit=True)

    def select(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers into the summary, for the server takes none of earlier steps."""
        self._run.summary.update({"selected/step": step, **{f"selected/{name}": each for name, each in values.items()}})

    def close(self, is_done: bool) -> None:
        """Ends the run of W&B, as failed unless it is done."""
        self._run.finish(exit_code=0 if is_done else 1)
