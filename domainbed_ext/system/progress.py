"""Progress bars: one display for the whole process, on a terminal's stderr; no output elsewhere.

A bar that is opened while another is open is a further line of the same display. What is printed meanwhile appears
above the bars. A run's log is opened within `display`, so that it gets what is printed and nothing of the bars.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from domainbed_ext.system.sizes import format_size

BYTES = "bytes"
WINDOW = 120.0  # seconds over which a rate is taken
LEAST = 1.0  # seconds before a rate means anything

_shown: Progress | None = None
_is_hidden = False


class Pace:
    """Rate of progress, from what was done while it was watched.

    Args:
        clock: Clock in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples = deque([(clock(), 0.0)])

    def note(self, done: float) -> None:
        """Records how much is done by now.

        Args:
            done: Amount that is done by now.
        """
        now = self._clock()
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] > WINDOW:
            self._samples.popleft()

    def restart(self, done: float) -> None:
        """Forgets what was before: what was done without work would distort the rate.

        Args:
            done: Amount that is done by now.
        """
        self._samples = deque([(self._clock(), done)])

    @property
    def rate(self) -> float | None:
        """Amount per second; None as long as it is not known."""
        (start, before), (end, done) = self._samples[0], self._samples[-1]
        return (done - before) / (end - start) if end - start >= LEAST and done > before else None


class Bar:
    """A line of the display; it is not shown where there is no terminal.

    Args:
        display: Where it is shown; None for nowhere.
        label: Text before it.
        total: Amount that there is to do, if known.
        unit: What is counted, e.g. "images"; `BYTES` are shown as sizes.

    Attributes:
        seconds_left: Time left where the caller knows better than the rate of the bar: seconds, or None if that is not
            known.
    """

    def __init__(self, display: Progress | None, label: str, total: float | None, unit: str) -> None:
        self.display, self.unit = display, unit
        self.pace = Pace()
        self.done, self.total = 0.0, total
        self._seconds_left: tuple[float | None] | None = None
        self._follows = False
        self.is_closed = False
        self._task = display.add_task(label, total=total, bar=self, note="") if display else None

    @property
    def seconds_left(self) -> float | None:
        """Time left in seconds; None as long as it is not known."""
        if self._seconds_left is not None:
            return self._seconds_left[0]
        rate = self.pace.rate
        return None if rate is None or self.total is None else max(0.0, self.total - self.done) / rate

    @seconds_left.setter
    def seconds_left(self, seconds: float | None) -> None:
        self._seconds_left = (seconds,)

    def advance(self, count: float = 1) -> None:
        """Adds to what is done.

        Args:
            count: Amount that is added.
        """
        self.reach(self.done + count)

    def reach(self, done: float) -> None:
        """Sets how much is done in all.

        Args:
            done: Amount that is done by now.
        """
        self.done = done
        self.pace.note(done)
        self._show()

    def start_from(self, done: float) -> None:
        """Sets how much was done before, by an earlier attempt: it counts, but not towards the rate.

        Args:
            done: Amount that is done by now.
        """
        self.done = done
        self.pace.restart(done)
        self._show()

    def follow(self, done: float, total: float | None) -> None:
        """Sets how much there is by now; what there is at the first call was there before.

        Args:
            done: Amount that is there.
            total: Amount that there is to be, if known.
        """
        self.total = total
        if self._follows:
            self.reach(done)
        else:
            self._follows = True
            self.start_from(done)

    def leave_out(self, count: float) -> None:
        """Takes what need not be done off the total.

        Args:
            count: Amount that need not be done.
        """
        if self.total is not None:
            self.total -= count
        self.pace.restart(self.done)
        self._show()

    def note(self, text: str) -> None:
        """Shows a text behind the bar.

        Args:
            text: The text.
        """
        if self.display and self._task is not None:
            self.display.update(self._task, note=text)

    def _show(self) -> None:
        if self.display and self._task is not None:
            self.display.update(self._task, completed=self.done, total=self.total)

    def close(self, keep: bool) -> None:
        """Ends it.

        Args:
            keep: Whether it stays on the screen, if anything was done.
        """
        self.is_closed = True
        if self.display and self._task is not None:
            if keep and self.done:
                self.display.stop_task(self._task)
            else:
                self.display.remove_task(self._task)


class _Figure(ProgressColumn):
    """A column that never wraps: on a narrow terminal the bar gets shorter."""

    def get_table_column(self) -> Column:
        """Returns the column of the display's table."""
        return Column(no_wrap=True)


class _Count(_Figure):
    def render(self, task: Task) -> Text:
        bar: Bar = task.fields["bar"]
        if bar.unit == BYTES:
            return Text(format_size(bar.done) + (f" of {format_size(bar.total)}" if bar.total else ""))
        total = "" if bar.total is None else f"/{bar.total:,.0f}"
        return Text(f"{int(bar.done):,}{total} {bar.unit}".rstrip() if bar.done or total else "")


class _Rate(_Figure):
    def render(self, task: Task) -> Text:
        bar: Bar = task.fields["bar"]
        rate = bar.pace.rate
        return Text("" if rate is None else format_rate(rate, bar.unit))


class _Left(_Figure):
    def render(self, task: Task) -> Text:
        bar: Bar = task.fields["bar"]
        if bar.is_closed:
            return Text(f"in {format_duration(task.elapsed or 0.0)}")
        return Text("" if bar.seconds_left is None else f"{format_duration(bar.seconds_left)} left")


def format_rate(rate: float, unit: str) -> str:
    """Formats a rate: "312 images/s", "3.1 MB/s", or if it is slow "2.6 s each".

    Args:
        rate: Amount per second, above 0.
        unit: What is counted.
    """
    if unit == BYTES:
        return f"{format_size(rate)}/s"
    if rate < 1:
        return f"{format_duration(1 / rate)} each" if rate < 0.1 else f"{1 / rate:.1f} s each"
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"


def format_duration(seconds: float) -> str:
    """Formats a time, to two figures or so: "40 s", "7 min", "2 h 05 min", "3 d 4 h".

    Args:
        seconds: The time in seconds.
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def format_left(progress: Bar) -> str:
    """Formats the time left as the end of a line, e.g. ", about 3 min left"; empty where nothing is left.

    Args:
        progress: Bar of the work.
    """
    seconds = progress.seconds_left
    is_known = seconds is not None and progress.total is not None and progress.done < progress.total
    return f", about {format_duration(seconds)} left" if seconds is not None and is_known else ""


def hide() -> None:
    """Shows no bars in this process from now on: another one has the terminal."""
    global _is_hidden
    _is_hidden = True


@contextmanager
def display() -> Iterator[Progress | None]:
    """Opens the display, unless it is open; it stays open for all bars within.

    Yields:
        The display; None where there is no terminal.
    """
    global _shown
    if _shown is not None or _is_hidden or not _is_terminal():
        yield _shown
        return
    # Bound to the stream as it is now: a log that copies what is printed later does not get the bars.
    console = Console(file=sys.stderr, force_terminal=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), _Count(), _Rate(), _Left()
    to_terminal = sys.stdout.isatty()  # what is piped stays piped
    with Progress(
        *columns, TextColumn("{task.fields[note]}", markup=False), console=console, redirect_stdout=to_terminal
    ) as _shown:
        try:
            yield _shown
        finally:
            _shown = None


@contextmanager
def bar(label: str, total: float | None = None, unit: str = "") -> Iterator[Bar]:
    """Shows a bar with count, rate and time left. The outermost bar stays; one within another goes when it is done.

    Args:
        label: Text before it.
        total: Amount that there is to do, if known.
        unit: What is counted, e.g. "images".

    Yields:
        The bar.
    """
    is_outermost = _shown is None
    with display() as shown:
        line = Bar(shown, label, total, unit)
        try:
            yield line
        finally:
            line.close(keep=is_outermost)


def _is_terminal() -> bool:
    """Whether stderr is a terminal that can move its cursor; variables that ask for colour in pipes do not count."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
