"""Accuracies along the strength of the update, evaluated after a run: `strengths.jsonl` in its folder.

A strength a in [0, 1] scales what training changed: weights(a) = start + a (trained - start). A line holds the
accuracies of one strength, the step whose saved weights were scaled, a digest of these weights, and where they were
evaluated. The file is always replaced as a whole.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from domainbed_ext.errors import BenchmarkError, not_writable
from domainbed_ext.system import strict_json
from domainbed_ext.system.files import write_atomically

FILE = "strengths.jsonl"

Evaluation = dict[str, Any]
"""A line of the file: "strength", "step", "weights", the accuracies, "precision", "versions" and "machine"."""


def read(folder: Path) -> dict[int, list[Evaluation]]:
    """Reads the evaluations of a run by step, in the order of their strengths.

    Args:
        folder: Folder of the run.

    Raises:
        BenchmarkError: A line is not such an evaluation.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    by_step: defaultdict[int, list[Evaluation]] = defaultdict(list)
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            evaluation = json.loads(line)
            by_step[int(evaluation["step"])].append(evaluation | {"strength": float(evaluation["strength"])})
        except (ValueError, TypeError, KeyError) as error:
            raise BenchmarkError(
                f"{path} line {number} is not an evaluation at a strength: delete the file and run "
                "domainbed_ext.frontier again"
            ) from error
    return {step: sorted(each, key=lambda evaluation: evaluation["strength"]) for step, each in by_step.items()}


def add(folder: Path, evaluation: Evaluation) -> None:
    """Adds an evaluation, or accuracies to the one that is there of the same strength and weights.

    Evaluations of other weights, which the run no longer has, are deleted.

    Args:
        folder: Folder of the run.
        evaluation: Evaluation; on disk when this returns, and never half written.

    Raises:
        BenchmarkError: The folder cannot be written.
    """
    kept = {each["strength"]: each for each in of_weights(folder, evaluation["step"], evaluation["weights"])}
    kept[evaluation["strength"]] = kept.get(evaluation["strength"], {}) | evaluation
    lines = [strict_json.dumps(kept[strength], sort_keys=True) for strength in sorted(kept)]
    try:
        write_atomically(folder / FILE, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise not_writable(folder, error) from error


def of_weights(folder: Path, step: int, weights: str) -> list[Evaluation]:
    """The evaluations of some saved weights, in the order of their strengths.

    Args:
        folder: Folder of the run.
        step: Step that they were saved at.
        weights: Digest of them.
    """
    return [each for each in read(folder).get(step, []) if each["weights"] == weights]


def accuracies(values: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracies among the values of a record or an evaluation."""
    return {name: value for name, value in values.items() if name.endswith("_acc")}
