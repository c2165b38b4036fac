"""The benchmark's progress bar."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def show_progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar with rate and time left if stderr is a terminal; nothing otherwise.

    Args:
        total: Number of measurements.

    Yields:
        Function to call after each of them.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not sys.stderr.isatty():  # rich before 15 writes an empty line even for a disabled bar
        yield lambda: None
        return
    console = Console(file=sys.stderr, force_terminal=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, speed_estimate_period=120) as bar:
        task = bar.add_task("bench", total=total, rate="")

        def advance() -> None:
            bar.advance(task)
            speed = bar.tasks[task].speed
            if speed:
                bar.update(task, rate=f"{speed:.1f} a second" if speed >= 1 else f"{1 / speed:.1f} s each")

        yield advance
