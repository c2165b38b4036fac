"""The progress of a run in another process, on a terminal."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.system.attempts import read_latest
from domainbed_ext.system.progress import bar, format_duration

_TICK = 1.0  # seconds


@contextmanager
def watched(name: str, place: Path, steps: int) -> Iterator[None]:
    """Shows steps and elapsed time of a run while the context lasts.

    Args:
        name: Name of the run.
        place: Folder of the run, ours or upstream DomainBed's; it need not exist yet.
        steps: Number of its steps.
    """
    start = time.monotonic()
    with bar(name, steps, "steps") as line:

        def show() -> None:
            line.reach(steps_done(place, steps))
            attempt = read_latest(place)
            line.seconds_left = attempt.left if attempt else None  # the rate knows nothing of evaluations
            line.note(f"{format_duration(time.monotonic() - start)} so far")

        with _repeating(show):
            yield


def steps_done(place: Path, steps: int) -> int:
    """The steps that a run has done, as far as its folder says.

    A run of ours says it with each heartbeat. Others do with each record.

    Args:
        place: Folder of the run.
        steps: Number of its steps.
    """
    attempt, recorded = read_latest(place), 0
    with suppress(OSError, ValueError, KeyError, IndexError, TypeError):  # none yet, or half written
        recorded = json.loads(RunFolder(place).lines()[-1])["step"] + 1
    return max(recorded, round(steps * attempt.share) if attempt else 0)


@contextmanager
def _repeating(function: Callable[[], None]) -> Iterator[None]:
    """Calls a function at once, and then each second while the context lasts."""
    stop = threading.Event()

    def repeat() -> None:
        function()
        while not stop.wait(_TICK):
            function()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
