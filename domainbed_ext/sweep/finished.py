"""Compares a sweep's finished runs with the data, versions and source files that are here now.

A run's folder is named by its arguments, hyperparameters and weights file. The rest that its numbers follow from is
compared with its first record: other data are refused; other versions, another precision and changed source files
are accepted with a warning.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.algorithms.names import get_algorithm_class, get_objective_class
from domainbed_ext.datasets.base import MultipleDomainDataset
from domainbed_ext.datasets.digest import digest
from domainbed_ext.datasets.registry import get_dataset_class
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import precision
from domainbed_ext.objectives.base import Objective
from domainbed_ext.runs.differences import Kind, differences
from domainbed_ext.runs.folder import State
from domainbed_ext.runs.imports import load
from domainbed_ext.runs.provenance import own_sources, versions
from domainbed_ext.sweep.jobs import Job
from domainbed_ext.sweep.states import RunStatus, format_runs

_ACCEPTED = {
    Kind.VERSIONS: "other versions may round differently",
    Kind.PRECISION: "the precision auto is another on this processor",
    Kind.SOURCES: "to run them again, delete their folders",
}


def check_finished(statuses: Iterable[RunStatus]) -> None:
    """Refuses finished runs on other data than what is here, and prints a warning of what else has changed.

    Args:
        statuses: Statuses of a sweep's runs.

    Raises:
        BenchmarkError: Finished runs are of other data.
    """
    for warning in compare_records([status.job for status in statuses if status.state is State.DONE]):
        print(f"warning: {warning}", file=sys.stderr)


def compare_records(jobs: Iterable[Job]) -> list[str]:
    """Compares finished runs with the data, versions, precision and source files that are here now.

    Args:
        jobs: Jobs of a sweep whose runs are done.

    Returns:
        Warnings, each about all runs that it holds of.

    Raises:
        BenchmarkError: Finished runs are of other data.
    """
    records = [(job, record) for job in jobs if (record := _first_record(job)) is not None]
    here = _Here()
    differing: dict[Kind, list[tuple[Job, str]]] = defaultdict(list)
    for job, record in records:
        for kind, words in differences(record, here.facts(job)).items():
            differing[kind].append((job, words))
    if Kind.DATA in differing:
        raise _other_data(differing[Kind.DATA])
    warnings = []
    if silent := sum("data_digest" not in record and "data_digest" in here.facts(job) for job, record in records):
        warnings.append(
            f"{format_runs(silent)} finished before records held a digest of their data: assumed to be of the data here"
        )
    for kind, reason in _ACCEPTED.items():
        if runs := differing[kind]:
            count = f"{len(runs)} of {len(records)} finished runs"
            warnings.append(f"{count} are of other {kind.value} ({runs[0][1]}) and are accepted: {reason}")
    return warnings


def _first_record(job: Job) -> dict[str, Any] | None:
    try:
        return job.folder.first_record()
    except BenchmarkError:  # the tables name it and leave it out
        return None


def _other_data(runs: Sequence[tuple[Job, str]]) -> BenchmarkError:
    job, words = runs[0]
    return BenchmarkError(
        f"{job.sweep_dir} holds {format_runs(len(runs))} of {job.train_args['dataset']} on other data than "
        f"{job.train_args['data_dir']} ({words}; {job.name} first): give another --output_dir, or the data that the "
        "runs had"
    )


class _Here:
    """What a run that starts now would record, beyond its identity. A data set is listed once."""

    def __init__(self) -> None:
        self._versions = versions()
        self._data, self._sources = cache(_data), cache(_sources)

    def facts(self, job: Job) -> dict[str, Any]:
        """The facts by their names in a record.

        Args:
            job: Job of the run.
        """
        dataset, algorithm, data_dir = (job.train_args[name] for name in ("dataset", "algorithm", "data_dir"))
        return {
            "versions": self._versions,
            "precision": precision.choose(job.computation["hparams"]["precision"], _device(job)),
            "imports": load(job.extra_args.get("imports")),
            "sources": self._sources(algorithm, dataset),
            **self._data(dataset, data_dir),
        }


def _device(job: Job) -> torch.device:
    """The device of a run that starts here; one of a cluster may have the GPU that this machine lacks."""
    is_cpu = job.extra_args.get("device") == "cpu" or not torch.cuda.is_available()
    return torch.device("cpu" if is_cpu else "cuda")


def _data(name: str, data_dir: Path | str | None) -> Mapping[str, Any]:
    """The facts of a data set's files; none where there are no files, or they are not available."""
    if data_dir is None:
        return {}
    try:
        dataset = get_dataset_class(name)(data_dir, [], {})
    except BenchmarkError:
        return {}
    return {"environments": list(dataset.environments), "data_digest": digest(dataset)}


def _sources(algorithm: str, dataset: str) -> dict[str, str]:
    return {
        **own_sources(get_algorithm_class(algorithm), Algorithm),
        **own_sources(get_objective_class(algorithm), Objective),
        **own_sources(get_dataset_class(dataset), MultipleDomainDataset),
    }
