"""Sends the records of a run to the trackers that `--track` names; whatever these do, the run continues.

The run's folder holds `tracked/`, with the files of trackers and `state.json`: the run's id, and the last step that
each tracker received. So a resumed run sends no record twice, and a tracker that is added then receives all.
"""

import json
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from domainbed_ext.model_selection import best_step
from domainbed_ext.runs import checkpoint
from domainbed_ext.runs.arguments import PLACES
from domainbed_ext.runs.folder import TRACKED, RunFolder
from domainbed_ext.runs.run_name import name_run
from domainbed_ext.system import strict_json
from domainbed_ext.system.files import write_atomically
from domainbed_ext.trackers.base import TrackedRun, Tracker
from domainbed_ext.trackers.registry import TRACKERS
from domainbed_ext.trackers.values import tracked_values


class Tracking:
    """The trackers of a run.

    Args:
        folder: Folder of the run; it holds the records that the run keeps.
        facts: What every record of the run holds.
    """

    def __init__(self, folder: RunFolder, facts: Mapping[str, Any]) -> None:
        self._folder, self._facts = folder, facts
        self._path = folder.path / TRACKED / "state.json"
        self._trackers: dict[str, Tracker] = {}

    def open(self) -> None:
        """Starts all trackers, and sends them the records that they lack."""
        for name in dict.fromkeys(self._facts["args"].get("track") or ()):
            self._guard(name, self._start)

    def log(self, record: Mapping[str, Any]) -> None:
        """Sends a record to the trackers that have not received it."""
        for name in list(self._trackers):
            self._guard(name, self._send, record)

    def select(self) -> None:
        """Sends the record that training-domain validation selects, once the run is done."""
        for name in list(self._trackers):
            self._guard(name, self._select)

    def close(self, is_done: bool) -> None:
        """Ends all trackers.

        Args:
            is_done: Whether the run is done.
        """
        for name in list(self._trackers):
            self._guard(name, self._close, is_done)

    @cached_property
    def _run(self) -> TrackedRun:
        args, environments = self._facts["args"], self._facts["environments"]
        name = name_run(args, [str(environments[env]) for env in args["test_envs"]])
        group = self._folder.path.absolute().parent.name
        return TrackedRun(self._state["id"], name, group, self._path.parent, _describe(self._facts))

    @cached_property
    def _state(self) -> dict[str, Any]:
        """The run's id, and the last step that each tracker received."""
        self._path.parent.mkdir(exist_ok=True)
        if not self._path.exists():
            self._write_state({"id": uuid.uuid4().hex[:12], "steps": {}})
        state: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        return state

    def _write_state(self, state: Mapping[str, Any]) -> None:
        write_atomically(self._path, strict_json.dumps(state) + "\n")

    def _start(self, name: str) -> None:
        last_step = self._state["steps"].get(name)
        self._trackers[name] = TRACKERS.find(name)(self._run, last_step)
        for record in self._folder.records() if self._folder.lines() else ():
            self._send(name, record)

    def _send(self, name: str, record: Mapping[str, Any]) -> None:
        step, steps = record["step"], self._state["steps"]
        if step > steps.get(name, -1):
            self._trackers[name].log(step, tracked_values(record, self._facts))
            steps[name] = step
            self._write_state(self._state)

    def _select(self, name: str) -> None:
        best = best_step(self._folder.records())
        self._trackers[name].select(best["step"], tracked_values(best, self._facts))

    def _close(self, name: str, is_done: bool) -> None:
        self._trackers[name].close(is_done)

    def _guard(self, name: str, call: Callable[..., None], *args: Any) -> None:
        """Calls a function of a tracker's name; if it fails, the run continues without the tracker."""
        random = checkpoint.random_states()  # which no tracker moves
        try:
            call(name, *args)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"warning: --track {name} failed ({reason}): the run continues without it", file=sys.stderr)
            self._trackers.pop(name, None)
        finally:
            checkpoint.set_random_states(random)


@contextmanager
def tracked(folder: RunFolder, facts: Mapping[str, Any]) -> Iterator[Tracking]:
    """The trackers of a run, as long as the context lasts.

    Args:
        folder: Folder of the run.
        facts: What every record of the run holds.
    """
    tracking = Tracking(folder, facts)
    tracking.open()
    is_done = False
    try:
        yield tracking
        tracking.select()
        is_done = True
    finally:
        tracking.close(is_done)


def _describe(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers of a run follow from; places on this machine are left out."""
    args = {name: value for name, value in facts["args"].items() if name not in PLACES and value is not None}
    hparams = {name: value for name, value in facts["hparams"].items() if name != "weights"}
    described: dict[str, Any] = json.loads(strict_json.dumps({**args, "hparams": hparams}))
    names = ("environments", "precision", "trainable_parameters", "total_parameters", "versions")
    return described | {name: facts[name] for name in names}
