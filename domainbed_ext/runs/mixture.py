"""Whether runs belong in one table: on the same data, and of the same versions, precision, weights and source files."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.differences import environments_that_differ

Record = dict[str, Any]


def check(records: Iterable[Record], input_dir: object) -> list[str]:
    """Checks that runs belong in one table.

    Args:
        records: Records of any number of runs, each with the name of its run under "run".
        input_dir: Folder of the runs.

    Returns:
        Warnings about differences that are accepted.

    Raises:
        BenchmarkError: Runs on one data set have different data.
    """
    runs = list({record["run"]: record for record in records}.values())
    _check_data(runs, input_dir)
    warnings = []
    if without := sum(not run.get("data_digest") for run in runs):
        warnings.append(f"{without} of {len(runs)} runs do not record their data: taken as the same data")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for run in runs:
        for label, value in _ingredients(run):
            counts[label][value] += 1
    mixed = [f"{label} {_listed(values)}" for label, values in counts.items() if len(values) > 1]
    return [*warnings, *([f"the tables mix runs: {'; '.join(mixed)}"] if mixed else [])]


def _check_data(runs: Iterable[Record], input_dir: object) -> None:
    kinds: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.get("data_digest"):
            kinds[run["args"]["dataset"]][" ".join([*run["environments"], *run["data_digest"]])].append(run)
    for dataset, of_kind in kinds.items():
        if len(of_kind) > 1:
            many, few, *_ = sorted(of_kind.values(), key=len, reverse=True)
            words = environments_that_differ(
                *(facts for run in (few[0], many[0]) for facts in (run["environments"], run["data_digest"]))
            )
            raise BenchmarkError(
                f"{input_dir} mixes runs of {dataset} on different data ({words}): {len(few)} like {few[0]['run']}, "
                f"{len(many)} like {many[0]['run']}; move those that you do not mean to another folder"
            )


def _ingredients(run: Record) -> Iterator[tuple[str, str]]:
    """What a run's numbers depend on besides its identity and its data: labels and values."""
    args, hparams = run["args"], run.get("hparams") or {}
    for name, version in (run.get("versions") or {}).items():
        yield name, version
    if "precision" in run:
        yield f"precision {hparams.get('precision')} of {args['algorithm']} on {args['dataset']}", run["precision"]
    if run.get("backbone_digest"):
        words = (str(hparams.get(name)) for name in ("backbone", "weights", "image_size"))
        yield f"loaded weights of {' '.join(words)}", run["backbone_digest"]
    for name, digest in (run.get("sources") or {}).items():
        yield f"source file of {name}", digest


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{value} in {count}" for value, count in counts.most_common())
