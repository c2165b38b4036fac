"""Finds what would stop a run of a sweep before any of them starts; leaves no trace."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from domainbed_ext import hparams_registry
from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.algorithms.names import parse_name
from domainbed_ext.averaging.hyperparameters import AVERAGE
from domainbed_ext.data import duplicates
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import backbones, conversions
from domainbed_ext.runs import checkpoint
from domainbed_ext.runs.setup import Setup, set_up
from domainbed_ext.sweep.jobs import Job
from domainbed_ext.sweep.states import format_runs
from domainbed_ext.system import strict_json
from domainbed_ext.system.progress import bar
from domainbed_ext.system.sizes import format_size
from domainbed_ext.trackers.registry import check_trackers

# Hyperparameters that change neither the layers of a model nor whether it can be made; of ranks the largest is tried.
_FREE = (
    *("lr", "weight_decay", "batch_size", "class_balanced", "data_augmentation", "rank"),
    *("adapter_dropout", "resnet_dropout", "vit_dropout", "adapter_seed"),
    *("schedule", "warmup", "clip_grad", "label_smoothing", "accumulate", *AVERAGE),
)
_RECORD, _LOGS = 4_000, 20_000  # bytes
_IMAGE = 11  # bytes of an image's label, split and compressed name


@dataclass(frozen=True)
class Checked:
    """The checks' results for one kind of runs, an algorithm on a data set.

    Attributes:
        setup: Setup of its run with the largest batches.
        trained: Bytes of the parameters that it trains.
        predicted: Bytes of its predictions at a step.
    """

    setup: Setup
    trained: int
    predicted: int = 0


def check_runs(jobs: Sequence[Job]) -> dict[tuple[str, str], Checked]:
    """Sets up as many runs as it takes to meet every mistake, and checks that there is room on disk for all.

    Args:
        jobs: Jobs of a sweep.

    Returns:
        Results for each kind.

    Raises:
        BenchmarkError: Something would stop a run.
    """
    for job in jobs[:1]:
        check_trackers(job.extra_args["track"])
    setups = _set_up(jobs)
    for job in jobs:
        try:
            hparams_registry.check(job.computation["hparams"])
        except BenchmarkError as error:
            raise BenchmarkError(f"{job}: {error}") from error
    trained = _make_algorithms(jobs, setups)
    checked = {kind: Checked(setup, trained[kind], count_prediction_bytes(setup)) for kind, setup in setups.items()}
    _check_room(jobs, checked)
    return checked


def check_duplicates(checked: Mapping[tuple[str, str], Checked]) -> None:
    """Looks for images that a data set holds more than once, in each data set once.

    Args:
        checked: Results of `check_runs`.
    """
    for setup in {dataset: each.setup for (dataset, _), each in checked.items()}.values():
        duplicates.search(setup.args.dataset, setup.dataset, setup.args.duplicates, setup.args.cache_dir)


def _set_up(jobs: Sequence[Job]) -> dict[tuple[str, str], Setup]:
    """Sets up a run of each kind, and one that trains on each environment: those with the largest batches.

    No more than these, since each set-up lists a data set's files.
    """
    setups: dict[tuple[str, str], Setup] = {}
    verified: set[str] = set()
    trained_on: set[tuple[str, int]] = set()
    with bar("checking", len(jobs), "runs") as shown:
        for job in sorted(jobs, key=_batch_size, reverse=True):
            shown.advance()
            dataset = job.train_args["dataset"]
            earlier = next((setup for kind, setup in setups.items() if kind[0] == dataset), None)
            sources = set() if earlier is None else {(dataset, i) for i in _training_environments(job, earlier)}
            if earlier is not None and job.kind in setups and sources <= trained_on:
                continue
            args = job.args
            setup = set_up(replace(args, verify_images=args.verify_images and dataset not in verified))
            verified.add(dataset)
            trained_on |= {(dataset, i) for i in setup.train_envs}
            setups.setdefault(job.kind, setup)
    return {job.kind: setups[job.kind] for job in jobs}  # in the sweep's order


def _batch_size(job: Job) -> float:
    size = job.computation["hparams"]["batch_size"]
    return size if isinstance(size, int) else float("inf")


def _training_environments(job: Job, earlier: Setup) -> list[int]:
    return [i for i in range(len(earlier.dataset)) if i not in job.train_args["test_envs"]]


def _make_algorithms(jobs: Sequence[Job], setups: dict[tuple[str, str], Setup]) -> dict[tuple[str, str], int]:
    """Makes one of all models that differ in what can go wrong; returns the most bytes that each kind trains."""
    alike: dict[str, list[Job]] = {}
    for job in jobs:
        hparams, dataset = job.computation["hparams"], job.train_args["dataset"]
        method, named = parse_name(job.train_args["algorithm"])
        fixed = {name: value for name, value in hparams.items() if name not in _FREE}
        key = [dataset, method, named.get("rank"), fixed, job.computation["weights"]]
        alike.setdefault(strict_json.dumps(key, sort_keys=True), []).append(job)
    trained: dict[tuple[str, str], int] = {}
    with bar("checking", len(alike), "models") as shown:
        for group in alike.values():
            largest = max(group, key=lambda job: job.computation["hparams"].get("rank", 0))
            with conversions.already_reported():  # runs report it
                size = _count_trained_bytes(adapt_setup(setups[largest.kind], largest).make_algorithm())
            trained |= {job.kind: max(trained.get(job.kind, 0), size) for job in group}
            shown.advance()
    return trained


def adapt_setup(setup: Setup, job: Job) -> Setup:
    """Makes the setup of a run from that of another run on the same data set; the splits are still the other's."""
    args = job.args.complete()
    hparams = args.resolve_hparams()
    inputs = backbones.inputs(hparams["backbone"], hparams["image_size"], args.input_stats)
    return replace(setup, args=args, hparams=hparams, inputs=inputs)


def _count_trained_bytes(algorithm: Algorithm) -> int:
    return sum(p.numel() * p.element_size() for p in algorithm.parameters() if p.requires_grad)


def count_records(setup: Setup) -> int:
    """Counts the records that a run writes."""
    return 1 if setup.make_average().judges else setup.count_evaluations()


def count_prediction_bytes(setup: Setup) -> int:
    """Counts the bytes of the predictions of a step: logits in float16, and for each image label, split and name."""
    images = sum(len(setup.evaluated(name)) for name in setup.splits)
    return images * (2 * setup.dataset.num_classes + _IMAGE)


def estimate_disk(jobs: Sequence[Job], checked: dict[tuple[str, str], Checked], parallel: int = 1) -> tuple[int, int]:
    """Estimates the bytes that runs leave, or need while they run.

    Args:
        jobs: Jobs that are to run.
        checked: Results of `check_runs`.
        parallel: Number of runs at once.

    Returns:
        The least (trained parameters and predictions are saved once per run, and no checkpoint is), and the most.
    """
    least = most = 0
    for job in jobs:
        kind = checked[job.kind]
        text = count_records(kind.setup) * _RECORD + _LOGS
        saved = 0 if job.extra_args["skip_model_save"] else kind.trained
        saved += 0 if job.extra_args["skip_predictions"] else kind.predicted
        least += text + saved
        most += text + saved * min(2, count_records(kind.setup))  # selected, and last where it is another
    if any(job.extra_args["save_minutes"] or job.extra_args["save_steps"] for job in jobs):
        # Weights, Adam's two moments, the weights of the best step and those of an average; while one is written those
        # kept are still there.
        largest = max((4 + kind.setup.make_average().copies) * kind.trained for kind in checked.values())
        most += largest * (checkpoint.KEPT + 1) * min(parallel, len(jobs))
    return least, most


def find_free_space(sweep_dir: Path) -> int:
    """Finds the number of bytes that are free where a sweep's folder is, or will be."""
    place = sweep_dir.absolute()
    while not place.is_dir():
        place = place.parent
    return shutil.disk_usage(place).free


def _check_room(jobs: Sequence[Job], checked: dict[tuple[str, str], Checked]) -> None:
    if not jobs:
        return
    (least, _), room = estimate_disk(jobs, checked), find_free_space(jobs[0].sweep_dir)
    if least > room:
        raise BenchmarkError(
            f"{jobs[0].sweep_dir} has {format_size(room)} free, and {format_runs(len(jobs))} would save "
            f"{format_size(least)}: make room, give another --output_dir, or add --skip_model_save"
        )
