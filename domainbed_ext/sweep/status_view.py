"""The output of `sweep status`: progress of the sweep, where its time goes, and what failed."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from domainbed_ext.runs.folder import State
from domainbed_ext.sweep.by_name import readable_name
from domainbed_ext.sweep.states import RunStatus, describe_states, format_runs
from domainbed_ext.sweep.time_left import estimate_time_left
from domainbed_ext.system import strict_json
from domainbed_ext.system.progress import format_duration

SHOWN = 10  # of the running and of the failed runs; --json has them all
SLOWEST = 3
_BAR = 12  # characters
_STATES = (State.DONE, State.RUNNING, State.QUEUED, State.INTERRUPTED, State.FAILED, State.NOT_LAUNCHED)
_NARROW = (0, 1, 0, 0)  # spaces around a cell of a table


def as_json(statuses: Sequence[RunStatus], sweep_dir: Path) -> str:
    """All of it for scripts.

    Args:
        statuses: Statuses of the runs.
        sweep_dir: Folder of the sweep.

    Returns:
        JSON: "output_dir", "counts" by state, "diverged" (runs), "seconds_left" (null if unknown), and "runs".
    """
    counts = Counter(status.state for status in statuses)
    report = {
        "output_dir": str(sweep_dir),
        "counts": {state.value: counts[state] for state in _STATES},
        "diverged": sum(status.diverged for status in statuses),
        "seconds_left": estimate_time_left(statuses).seconds,
        "runs": [_fields(status) for status in statuses],
    }
    return strict_json.dumps(report, indent=2)


def _fields(status: RunStatus) -> dict[str, Any]:
    job, attempt = status.job, status.attempt
    failed = status.state is State.FAILED
    names = ("dataset", "algorithm", "test_envs", "hparams_seed", "trial_seed")
    return {
        **{name: job.train_args[name] for name in names},
        "run": job.name,
        "name": readable_name(job),
        "state": status.state.value,
        "diverged": status.diverged,
        "share": status.share,
        "seconds": status.seconds,
        "attempts": attempt.number if attempt else None,
        "host": attempt.owner.get("host") if attempt else None,
        "launch": str(status.wait.launch) if status.wait else None,
        "error": job.folder.failure() if failed else None,
        "log": str(job.folder.path / "err.txt") if failed else None,
    }


def render(statuses: Sequence[RunStatus], sweep_dir: Path, encoding: str = "utf-8") -> RenderableType:
    """All of it for people.

    Args:
        statuses: Statuses of the runs.
        sweep_dir: Folder of the sweep.
        encoding: Encoding of where it is printed; bars are drawn in ASCII unless it is a UTF.
    """
    blocks = ("█", "░") if encoding.lower().startswith("utf") else ("#", ".")
    parts = [
        Text(f"{format_runs(len(statuses))} in {sweep_dir}: {describe_states(statuses)}"),
        _kinds(statuses, blocks),
        *_diverged(statuses),
        Text(str(estimate_time_left(statuses))),
        *_running([status for status in statuses if status.state is State.RUNNING]),
        *_slowest(statuses),
        *_failed([status for status in statuses if status.state is State.FAILED]),
    ]
    return Group(*parts)


def _kinds(statuses: Sequence[RunStatus], blocks: tuple[str, str]) -> Table:
    """A row for each data set and algorithm, and one for all."""
    kinds = defaultdict(list)
    for status in statuses:
        kinds[status.job.kind].append(status)
    seen = {status.state for status in statuses} | {State.DONE}
    shown = [state for state in _STATES if state in seen]
    table = Table(box=box.SIMPLE_HEAD, padding=_NARROW, show_footer=len(kinds) > 1)

    def add(header: str, footer: str, justify: Any = "right") -> None:
        table.add_column(header, footer, justify=justify, no_wrap=True)

    add("data set", "all", "left")
    add("algorithm", "", "left")
    add("", _bar(statuses, blocks), "left")
    add("share", _percent(statuses))
    for state in shown:
        add(state.value.replace(" ", "\n"), _count(statuses, state))
    add("runs", str(len(statuses)))
    for (dataset, algorithm), members in kinds.items():
        counts = [_count(members, state) for state in shown]
        table.add_row(
            Text(dataset), Text(algorithm), _bar(members, blocks), _percent(members), *counts, str(len(members))
        )
    return table


def _share(statuses: Sequence[RunStatus]) -> float:
    return sum(status.share for status in statuses) / len(statuses)


def _bar(statuses: Sequence[RunStatus], blocks: tuple[str, str]) -> str:
    full = int(_BAR * _share(statuses))  # full only when all is done
    return blocks[0] * full + blocks[1] * (_BAR - full)


def _percent(statuses: Sequence[RunStatus]) -> str:
    return f"{int(1000 * _share(statuses)) / 10:.1f} %"


def _count(statuses: Iterable[RunStatus], state: State) -> str:
    return str(sum(status.state is state for status in statuses) or "-")


def _diverged(statuses: Sequence[RunStatus]) -> list[Text]:
    count = sum(status.diverged for status in statuses)
    return [Text(f"{format_runs(count)} diverged: a loss or an output was not finite")] if count else []


def _section(title: str) -> Text:
    return Text(f"\n{title}", style="bold")


def _rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=_NARROW)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _running(statuses: Sequence[RunStatus]) -> list[RenderableType]:
    """The running runs, the longest first."""
    if not statuses:
        return []
    longest = sorted(statuses, key=lambda status: -(status.seconds or 0.0))[:SHOWN]
    rows = [
        (
            str(status.job),
            f"{100 * status.share:.0f} %",
            format_duration(status.seconds or 0.0),
            str(status.attempt.owner.get("host", "?")) if status.attempt else "?",
            status.job.name,
        )
        for status in longest
    ]
    return [
        _section(f"running{_of(longest, statuses)}"),
        _rows(("run", "share", "time", "host", "folder"), rows),
    ]


def _slowest(statuses: Sequence[RunStatus]) -> list[RenderableType]:
    done = [status for status in statuses if status.state is State.DONE and status.seconds]
    if not done:
        return []
    slowest = sorted(done, key=lambda status: -(status.seconds or 0.0))[:SLOWEST]
    rows = [(str(status.job), format_duration(status.seconds or 0.0), status.job.name) for status in slowest]
    total = sum(status.seconds or 0.0 for status in done)
    return [
        _section(f"slowest of {len(done)} done, which took {format_duration(total)} together"),
        _rows(("run", "time", "folder"), rows),
    ]


def _failed(statuses: Sequence[RunStatus]) -> list[RenderableType]:
    if not statuses:
        return []
    shown = statuses[:SHOWN]
    lines = [
        f"{status.job}: {status.job.folder.failure()} (log: {status.job.folder.path / 'err.txt'})" for status in shown
    ]
    return [_section(f"failed{_of(shown, statuses)}"), *map(Text, lines)]


def _of(shown: Sequence[RunStatus], statuses: Sequence[RunStatus]) -> str:
    return f" ({len(shown)} of {len(statuses)}; --json has all)" if len(shown) < len(statuses) else ""
