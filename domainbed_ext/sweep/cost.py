"""The cost of a sweep, estimated from a few real steps of each kind of run in it."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeVar

import torch
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.data.loader import Minibatch
from domainbed_ext.launchers import get_launcher
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.profile import wait
from domainbed_ext.runs.setup import Setup, count_images_a_domain, set_up_process
from domainbed_ext.sweep.arguments import SweepArguments
from domainbed_ext.sweep.check import Checked, count_records, estimate_disk, find_free_space
from domainbed_ext.sweep.jobs import Job
from domainbed_ext.sweep.states import format_runs
from domainbed_ext.system.progress import bar, format_duration
from domainbed_ext.system.sizes import format_size

T = TypeVar("T")

STEPS = 3  # that are timed, after one that warms up
ENOUGH = 20.0  # seconds after which one timed step is enough


@dataclass(frozen=True)
class Rates:
    """How fast a kind of run is on this machine.

    Attributes:
        start: Seconds before the first step.
        step: Seconds of a training step.
        image: Seconds to evaluate an image.
    """

    start: float
    step: float
    image: float


def measure_rates(setup: Setup) -> Rates:
    """Times the start, some steps and a batch of evaluation; decodes each time, to leave nothing in the image cache."""
    setup = replace(setup, args=replace(setup.args, cache_dir="none"))
    set_up_process(setup.args)
    start, algorithm = _timed(setup.make_algorithm)
    steps: list[float] = []
    began = time.perf_counter()
    feed = Feed(setup, algorithm)
    stream = feed.training(range(STEPS + 1))
    for _ in range(STEPS + 1):
        steps.append(_timed(lambda: _step(algorithm, next(stream)))[0])
        if len(steps) > 1 and time.perf_counter() - began > ENOUGH:
            break
    name = setup.validation_splits[0]
    batch = replace(setup.splits[name], keys=setup.splits[name].keys[: feed.evaluation_batch])
    feed = Feed(replace(setup, splits={name: batch}), algorithm)
    evaluation, _ = _timed(lambda: feed.accuracies(0, [name]))
    return Rates(start, median(steps[1:]), evaluation / len(batch))


def _step(algorithm: Algorithm, minibatches: list[Minibatch]) -> None:
    algorithm.update(minibatches)
    wait(algorithm.device)


def _timed(function: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def estimate_seconds(job: Job, setup: Setup, rates: Rates) -> float:
    """Estimates the seconds that a run takes.

    Args:
        job: Job of the run.
        setup: Setup of a run of its kind.
        rates: Rates of its kind.
    """
    # The time of a step is nearly proportional to its images.
    step = rates.step * count_images_a_domain(job.computation["hparams"]) / setup.images_a_domain
    validation, rest = _images(job, setup)
    count = count_records(setup)
    full: float = count
    if setup.args.evaluate == "lean":
        full = 2 - 1 / count  # the best and the last record, which are the same in one of `count` random orders
    return rates.start + setup.steps * step + rates.image * (count * validation + full * rest)


def _images(job: Job, setup: Setup) -> tuple[float, float]:
    """Images that every record evaluates, and those that a lean one leaves out."""
    validation = rest = 0.0
    for i, environment in enumerate(setup.dataset.datasets):
        out = int(len(environment) * setup.args.holdout_fraction)
        kept = len(environment) - out
        if i in job.train_args["test_envs"]:
            rest += out + kept
        else:
            validation += out
            rest += kept * setup.args.train_eval_share
    return validation, rest


def count_runs_at_once(args: SweepArguments, jobs: Sequence[Job]) -> int | None:
    """Tells how many runs go at once; None where a scheduler decides.

    Args:
        args: Arguments of the sweep.
        jobs: Jobs that are to run.
    """
    commands = [job.command for job in jobs]
    return get_launcher(args.command_launcher).count_runs_at_once(commands, args.jobs, args.launcher_options)


def estimate_cost(
    jobs: Sequence[Job],
    checked: dict[tuple[str, str], Checked],
    at_once: int | None,
) -> tuple[RenderableType, RenderableType]:
    """Times each kind of runs, and estimates what all will take.

    Args:
        jobs: Jobs that are to run.
        checked: Results of `check_runs`.
        at_once: Number of runs at once; None if that is unknown.

    Returns:
        A table with a row for each kind, and a sentence with the totals.
    """
    of_kind = defaultdict(list)
    for job in jobs:
        of_kind[job.kind].append(job)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("data set", "algorithm"):
        table.add_column(header)
    for header in ("runs", "a step", "an image", "a run", "all", "saved a run"):
        table.add_column(header, justify="right")
    taken = []
    with bar("timing", len(of_kind), "kinds of runs") as shown:
        measured = {}
        for kind in of_kind:
            shown.note(f"{kind[1]} on {kind[0]}")
            measured[kind] = measure_rates(checked[kind].setup)
            shown.advance()
    for (dataset, algorithm), members in of_kind.items():
        kind_checked, rates = checked[dataset, algorithm], measured[dataset, algorithm]
        each = [estimate_seconds(job, kind_checked.setup, rates) for job in members]
        taken += each
        saved = 0 if members[0].extra_args["skip_model_save"] else kind_checked.trained
        row = (
            *(dataset, algorithm, str(len(members)), f"{1000 * rates.step:.0f} ms", f"{1000 * rates.image:.1f} ms"),
            *(format_duration(sum(each) / len(each)), format_duration(sum(each)), format_size(saved)),
        )
        table.add_row(*map(Text, row))
    wall = "" if at_once is None else f": {format_duration(max(sum(taken) / at_once, *taken))} at {at_once} at once"
    most = estimate_disk(jobs, checked, at_once or len(jobs))[1]
    room = find_free_space(jobs[0].sweep_dir)
    totals = (
        f"{format_runs(len(jobs))}: {_format_core_time(sum(taken), jobs)} at the speed just measured{wall}; "
        f"up to {format_size(most)} on disk, of {format_size(room)} free"
    )
    return table, Text(totals)


def _format_core_time(seconds: float, jobs: Sequence[Job]) -> str:
    cuda = torch.cuda.is_available() and jobs[0].extra_args["device"] != "cpu"
    threads = max(job.computation["args"]["threads"] for job in jobs)
    hours = seconds / 3600 * (1 if cuda else threads)
    device, what = (f" ({torch.cuda.get_device_name()})", "GPU") if cuda else ("", "core")
    return f"{hours:.1f} {what} hours{device}" if hours >= 1 else f"{60 * hours:.2g} {what} minutes{device}"
