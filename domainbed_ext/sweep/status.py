"""What `sweep status` shows: how far a sweep is, where its time goes, and what went wrong."""

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from domainbed_ext.runs.folder import State
from domainbed_ext.sweep.states import Standing, count_of, summary
from domainbed_ext.sweep.time_left import left
from domainbed_ext.system import strict_json
from domainbed_ext.system.console import output
from domainbed_ext.system.exit_codes import STOPPED
from domainbed_ext.system.progress import duration

SHOWN = 10  # of the runs at work and of those that failed; --json has them all
SLOWEST = 3
REFRESH = 3.0  # seconds
_BAR = 12  # characters
_STATES = (State.DONE, State.RUNNING, State.QUEUED, State.INTERRUPTED, State.FAILED, State.NOT_LAUNCHED)
_NARROW = (0, 1, 0, 0)  # spaces around a cell of a table


def show(look: Callable[[], Sequence[Standing]], sweep_dir: Path, watch: bool = False) -> int:
    """Prints how far a sweep is.

    Args:
        look: at its runs.
        sweep_dir: the sweep's folder.
        watch: again and again, on a terminal, until all is done or Ctrl-C.

    Returns:
        The exit code: that of Ctrl-C, if this ended the watch.
    """
    console = output()
    if not (watch and console.is_terminal):
        console.print(render(look(), sweep_dir, console.encoding))
        return 0
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                start = time.process_time()
                standings = look()
                live.update(render(standings, sweep_dir, console.encoding), refresh=True)
                if all(standing.state is State.DONE for standing in standings):
                    return 0
                time.sleep(max(REFRESH, 20 * (time.process_time() - start)))  # a twentieth of a core at most
    except KeyboardInterrupt:
        print("stopped watching: the runs continue", file=sys.stderr)
        return STOPPED


def as_json(standings: Sequence[Standing], sweep_dir: Path) -> str:
    """All of it for scripts.

    "output_dir", "counts" by state, "diverged" (runs), "seconds_left" (null if unknown), and "runs".
    """
    counts = Counter(standing.state for standing in standings)
    report = {
        "output_dir": str(sweep_dir),
        "counts": {state.value: counts[state] for state in _STATES},
        "diverged": sum(standing.diverged for standing in standings),
        "seconds_left": left(standings).seconds,
        "runs": [_fields(standing) for standing in standings],
    }
    return strict_json.dumps(report, indent=2)


def _fields(standing: Standing) -> dict[str, Any]:
    job, attempt = standing.job, standing.attempt
    failed = standing.state is State.FAILED
    names = ("dataset", "algorithm", "test_envs", "hparams_seed", "trial_seed")
    return {
        **{name: job.train_args[name] for name in names},
        "run": job.name,
        "state": standing.state.value,
        "diverged": standing.diverged,
        "share": standing.share,
        "seconds": standing.seconds,
        "attempts": attempt.number if attempt else None,
        "host": attempt.owner.get("host") if attempt else None,
        "launch": str(standing.waits.launch) if standing.waits else None,
        "error": job.folder.failure() if failed else None,
        "log": str(job.folder.path / "err.txt") if failed else None,
    }


def render(standings: Sequence[Standing], sweep_dir: Path, encoding: str = "utf-8") -> RenderableType:
    """All of it for people.

    Args:
        standings: of the runs.
        sweep_dir: the sweep's folder.
        encoding: of where it is printed, in which the bars must be written.
    """
    blocks = ("█", "░") if encoding.lower().startswith("utf") else ("#", ".")
    parts = [
        Text(f"{count_of(len(standings))} in {sweep_dir}: {summary(standings)}"),
        _kinds(standings, blocks),
        *_diverged(standings),
        Text(str(left(standings))),
        *_running([standing for standing in standings if standing.state is State.RUNNING]),
        *_slowest(standings),
        *_failed([standing for standing in standings if standing.state is State.FAILED]),
    ]
    return Group(*parts)


def _kinds(standings: Sequence[Standing], blocks: tuple[str, str]) -> Table:
    """A row for each data set and algorithm, and one for all."""
    kinds = defaultdict(list)
    for standing in standings:
        kinds[standing.job.kind].append(standing)
    seen = {standing.state for standing in standings} | {State.DONE}
    shown = [state for state in _STATES if state in seen]
    table = Table(box=box.SIMPLE_HEAD, padding=_NARROW, show_footer=len(kinds) > 1)

    def add(header: str, footer: str, justify: Any = "right") -> None:
        table.add_column(header, footer, justify=justify, no_wrap=True)

    add("data set", "all", "left")
    add("algorithm", "", "left")
    add("", _bar(standings, blocks), "left")
    add("share", _percent(standings))
    for state in shown:
        add(state.value.replace(" ", "\n"), _count(standings, state))
    add("runs", str(len(standings)))
    for (dataset, algorithm), members in kinds.items():
        counts = [_count(members, state) for state in shown]
        table.add_row(
            Text(dataset), Text(algorithm), _bar(members, blocks), _percent(members), *counts, str(len(members))
        )
    return table


def _share(standings: Sequence[Standing]) -> float:
    return sum(standing.share for standing in standings) / len(standings)


def _bar(standings: Sequence[Standing], blocks: tuple[str, str]) -> str:
    full = int(_BAR * _share(standings))  # full only when all is done
    return blocks[0] * full + blocks[1] * (_BAR - full)


def _percent(standings: Sequence[Standing]) -> str:
    return f"{int(1000 * _share(standings)) / 10:.1f} %"


def _count(standings: Iterable[Standing], state: State) -> str:
    return str(sum(standing.state is state for standing in standings) or "-")


def _diverged(standings: Sequence[Standing]) -> list[Text]:
    count = sum(standing.diverged for standing in standings)
    return [Text(f"{count_of(count)} diverged: a loss or an output was not finite")] if count else []


def _section(title: str) -> Text:
    return Text(f"\n{title}", style="bold")


def _rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=_NARROW)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _running(standings: Sequence[Standing]) -> list[RenderableType]:
    """The runs at work, those that have been for the longest first."""
    if not standings:
        return []
    longest = sorted(standings, key=lambda standing: -(standing.seconds or 0.0))[:SHOWN]
    rows = [
        (
            str(standing.job),
            f"{100 * standing.share:.0f} %",
            duration(standing.seconds or 0.0),
            str(standing.attempt.owner.get("host", "?")) if standing.attempt else "?",
            standing.job.name,
        )
        for standing in longest
    ]
    return [
        _section(f"running{_of(longest, standings)}"),
        _rows(("run", "share", "time", "host", "folder"), rows),
    ]


def _slowest(standings: Sequence[Standing]) -> list[RenderableType]:
    done = [standing for standing in standings if standing.state is State.DONE and standing.seconds]
    if not done:
        return []
    slowest = sorted(done, key=lambda standing: -(standing.seconds or 0.0))[:SLOWEST]
    rows = [(str(standing.job), duration(standing.seconds or 0.0), standing.job.name) for standing in slowest]
    total = sum(standing.seconds or 0.0 for standing in done)
    return [
        _section(f"slowest of {len(done)} done, which took {duration(total)} together"),
        _rows(("run", "time", "folder"), rows),
    ]


def _failed(standings: Sequence[Standing]) -> list[RenderableType]:
    if not standings:
        return []
    shown = standings[:SHOWN]
    lines = [
        f"{standing.job}: {standing.job.folder.failure()} (log: {standing.job.folder.path / 'err.txt'})"
        for standing in shown
    ]
    return [_section(f"failed{_of(shown, standings)}"), *map(Text, lines)]


def _of(shown: Sequence[Standing], standings: Sequence[Standing]) -> str:
    return f" ({len(shown)} of {len(standings)}; --json has all)" if len(shown) < len(standings) else ""
