"""A progress bar of images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    """Images a second."""

    def render(self, task: Task) -> Text:
        """As text, empty as long as it is not known."""
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "")


@contextmanager
def images_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with count, rate and time left on a terminal's stderr; silence elsewhere.

    Args:
        label: shown before it.
        total: of the images.

    Yields:
        A function to call with a number of images that are done.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
