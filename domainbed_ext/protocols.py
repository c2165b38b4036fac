"""The protocols by name, and how each measures where there is more than one way.

leave_one_out   trains on all environments but one and tests on that one: DomainBed's, with our choices (the default)
single_source   trains on one environment and tests on all others, as in Zhu et al., Asymmetry in Low-Rank
                Adapters of Foundation Models (2024)
domainbed       leave_one_out with upstream DomainBed's choices throughout
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from domainbed_ext.errors import BenchmarkError, unknown

LEAVE_ONE_OUT, SINGLE_SOURCE, DOMAINBED = "leave_one_out", "single_source", "domainbed"

IMAGES, CONCEPTS = "images", "concepts"  # what `--split_by` holds out

CHOICES: dict[str, tuple[str, ...]] = {
    "validation_images": ("plain", "augmented"),
    "input_stats": ("backbone", "imagenet"),
    "sampling": ("replacement", "epochs"),
    "training_images": ("exact", "resized"),
    "split_by": (IMAGES, CONCEPTS),
    "test_on": ("in", "all"),
    "evaluate": ("all", "lean"),
}

# Values of options that are not given. "lean" evaluates what the tables need, in a third of the time. What it leaves
# out is needed by training curves, upstream's own collect_results and leave-one-domain-out cross-validation: runs and
# sweeps that hold pairs of environments out evaluate all.
_OURS: dict[str, Any] = {
    "validation_images": "plain",
    "input_stats": "backbone",
    "sampling": "replacement",
    "training_images": "exact",
    "split_by": IMAGES,
    "test_on": "in",
    "evaluate": "lean",
    "train_eval_share": 1.0,
    "precision": None,  # the hyperparameter's
    "threads": 1,
}
_UPSTREAM: dict[str, Any] = {
    **_OURS,
    **{"validation_images": "augmented", "input_stats": "imagenet", "evaluate": "all", "precision": "float32"},
}
PROTOCOLS: dict[str, dict[str, Any]] = {LEAVE_ONE_OUT: _OURS, SINGLE_SOURCE: _OURS, DOMAINBED: _UPSTREAM}

# Indices of the sources in Zhu et al. 2024: LabelMe, cartoon, Clipart, location 38.
_PAPER_SOURCES = {"VLCS": 1, "PACS": 1, "OfficeHome": 1, "TerraIncognita": 1}

# Choices and options of a later version, each with what all runs did before: at that, no run's identity has them.
LATER = {"split_by": IMAGES, "evaluations": None, "early_stopping": None}

PRECISIONS = ("auto", "bf16", "fp16", "float32")

_DEFAULT_TEST_ENVS = (0,)  # DomainBed's

Names = Sequence[Sequence[str]]
"""The names of a data set's environments in index order: the label and the folder's name of each."""


def protocol_of(record: Mapping[str, Any]) -> str:
    """The protocol of a record; upstream's records, and our oldest, name none."""
    return record["args"].get("protocol") or LEAVE_ONE_OUT


def choices(protocol: str | None, test_envs: Sequence[object] | None) -> dict[str, Any]:
    """Returns the protocol's values of options that are not given.

    Args:
        protocol: Name of the protocol; None for leave_one_out.
        test_envs: Test environments of the run; None if they were not given.

    Returns:
        Name of an option to its value. The test environments are among them where the protocol alone decides them.
    """
    protocol = protocol or LEAVE_ONE_OUT
    chosen: dict[str, Any] = {"protocol": protocol, **PROTOCOLS[protocol]}
    if protocol != SINGLE_SOURCE:
        chosen["test_envs"] = list(_DEFAULT_TEST_ENVS)
    if protocol == LEAVE_ONE_OUT and len(set(test_envs or ())) > 1:
        chosen["evaluate"] = "all"
    return chosen


def check_evaluate(evaluate: str | None, pairs: bool) -> None:
    """Refuses lean evaluation of runs that leave-one-domain-out cross-validation needs.

    Args:
        evaluate: Value of `--evaluate`.
        pairs: Whether there are runs that hold several environments out.

    Raises:
        BenchmarkError: The evaluation is lean and there are such runs.
    """
    if evaluate == "lean" and pairs:
        raise BenchmarkError(
            "--evaluate lean leaves out what leave-one-domain-out cross-validation needs of runs with a pair of test "
            "environments: add --single_test_envs, or leave --evaluate out"
        )


def left_out_environments(count: int, single: bool) -> Iterator[list[int]]:
    """The sets of test environments of a leave-one-out sweep, in DomainBed's order.

    Args:
        count: Number of environments.
        single: Whether each is held out alone; else every pair is too, which leave-one-domain-out cross-validation
            needs. Of two environments, no pair leaves one to train on.

    Yields:
        Indices of the test environments.
    """
    for i in range(count):
        yield [i]
        if not single and count > 2:
            for j in range(i + 1, count):
                yield [i, j]


def source_environments(
    source_envs: Sequence[str] | None, datasets: Mapping[str, Names], defaults: Mapping[str, int] = _PAPER_SOURCES
) -> dict[str, list[int]]:
    """Finds the environments that single-source runs train on.

    Args:
        source_envs: Labels, folders' names or indices; a data set takes those that are its own. None for the source
            of Zhu et al. 2024 where a data set has one, else each environment in turn.
        datasets: Names of the environments by data set.
        defaults: Index of the default source by data set.

    Returns:
        Ascending indices by data set.

    Raises:
        BenchmarkError: No data set has a name, a data set has none of the names, or it has no environment to be tested
            on.
    """
    for dataset, names in datasets.items():
        if len(names) < 2:
            raise BenchmarkError(
                f"{dataset} has {len(names)} environment(s), and --protocol {SINGLE_SOURCE} takes at least two: "
                "one to train on, the others to test on"
            )
    if source_envs is None:
        return {
            dataset: [defaults[dataset]] if dataset in defaults else list(range(len(names)))
            for dataset, names in datasets.items()
        }
    valid = {name for names in datasets.values() for environment in names for name in environment}
    sources: dict[str, set[int]] = {dataset: set() for dataset in datasets}
    for name in source_envs:
        matches = {dataset: index for dataset, names in datasets.items() if (index := _find(name, names)) is not None}
        if not matches:
            raise unknown(f"environment of {', '.join(datasets)} in --source_envs:", name, valid)
        for dataset, index in matches.items():
            sources[dataset].add(index)
    for dataset, indices in sources.items():
        if not indices:
            labels = ", ".join(environment[0] for environment in datasets[dataset])
            raise BenchmarkError(f"--source_envs names no environment of {dataset}: add one of {labels}")
    return {dataset: sorted(indices) for dataset, indices in sources.items()}


def environments_of_a_run(
    protocol: str,
    dataset: str,
    names: Names,
    test_envs: Sequence[str | int] | None = None,
    source_envs: Sequence[str | int] | None = None,
) -> tuple[list[int], list[int] | None]:
    """Finds the test environments of one run, and its source.

    Args:
        protocol: Name of the protocol.
        dataset: Name of the data set.
        names: Names of its environments.
        test_envs: Names or indices of the test environments; None if they were not given.
        source_envs: Names or indices of the environments to train on; None if they were not given.

    Returns:
        Indices of the test environments; of the source, as a list of one, or None unless the run is single-source.

    Raises:
        BenchmarkError: The environments make no such run, or the two options contradict each other.
    """
    count = len(names)
    tested = None if test_envs is None else find_test_envs(dataset, names, test_envs)
    if protocol != SINGLE_SOURCE:
        if source_envs is not None:
            raise BenchmarkError(f"--source_envs is an option of --protocol {SINGLE_SOURCE}: add that, or leave it out")
        return list(_DEFAULT_TEST_ENVS) if tested is None else tested, None
    if source_envs is not None:
        sources = source_environments([str(name) for name in source_envs], {dataset: names})[dataset]
        if tested is not None and sorted(tested) != [i for i in range(count) if i not in sources]:
            raise BenchmarkError(
                f"--source_envs {_labels(sources, names)} and --test_envs {_labels(tested, names)} contradict each "
                "other: the test environments are all but the source, so leave --test_envs out"
            )
    elif tested is not None:
        sources = [i for i in range(count) if i not in tested]
    else:
        sources = source_environments(None, {dataset: names})[dataset]
    if len(sources) != 1:
        raise BenchmarkError(
            f"a single-source run trains on one environment of {dataset}, not on {len(sources)} "
            f"({_labels(sources, names)}): give one with --source_envs"
        )
    return [i for i in range(count) if i not in sources], sources


def find_test_envs(dataset: str, names: Names, test_envs: Sequence[str | int]) -> list[int]:
    """Finds the indices of test environments. A number is an index, as in DomainBed, even if a label is a number.

    Args:
        dataset: Name of the data set.
        names: Names of its environments.
        test_envs: Labels, folders' names or indices.

    Raises:
        BenchmarkError: There is no such environment, one is named twice, or none is left to train on.
    """
    count = len(names)
    listed = ", ".join(f"{i} {' or '.join(dict.fromkeys(environment))}" for i, environment in enumerate(names))
    indices = []
    for name in test_envs:
        index = name if isinstance(name, int) else _find(name, names)
        if index is None or not 0 <= index < count:
            raise BenchmarkError(f"--test_envs {name}: {dataset} has no such environment: choose from {listed}")
        if index in indices:
            raise BenchmarkError(f"--test_envs names environment {index} {names[index][0]} twice: name each once")
        indices.append(index)
    if len(indices) == count:
        raise BenchmarkError(f"--test_envs names all {count} environments ({listed}): leave one to train on")
    return indices


def _find(name: str, names: Names) -> int | None:
    """The index of an environment; labels and folders' names come before indices, since labels may be numbers."""
    for index, environment in enumerate(names):
        if name.lower() in map(str.lower, environment):
            return index
    return int(name) if name.isdigit() and int(name) < len(names) else None


def _labels(indices: Sequence[int], names: Names) -> str:
    return ", ".join(names[i][0] for i in indices)
