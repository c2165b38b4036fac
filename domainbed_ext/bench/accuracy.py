"""Whether the fast implementations reach the accuracy of the exact one: the same runs, trial by trial.

The exact one is `domainbed_ext.bench.plain`: float32, images decoded each time, torchvision's augmentation. It draws
other random numbers, so its runs differ from ours as runs of other seeds do: compare means. Ours in float32 and in bf16
draw the same ones.
"""

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from domainbed_ext.bench import report, subprocesses
from domainbed_ext.bench.small_data import how_many, link_part
from domainbed_ext.model_selection import target_accuracy, validation_accuracy
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.system.machine import count_available_cores
from domainbed_ext.system.progress import bar

SMALL = 160  # px, at which PACS's images of 227 px are scaled down by `--training_images resized`


def measure(args: Namespace, output_dir: Path) -> None:
    """Trains every trial with each implementation; prints and rewrites the table after each trial.

    Args:
        args: Arguments of `python -m domainbed_ext.bench`.
        output_dir: Folder for the table.

    Raises:
        BenchmarkError: If one of the runs failed.
    """
    ways = {name: _ways(json.loads(args.hparams))[name] for name in args.compare}
    with (
        tempfile.TemporaryDirectory() as folder,
        bar("measuring", args.trials * sum(map(len, ways.values())), "runs") as shown,
    ):
        data = link_part(args.dataset, args.data_dir, args.per_class, Path(folder, "data"))
        for comparison, compared in ways.items():
            found: list[list[tuple[float, float]]] = []
            for trial in range(args.first_trial, args.first_trial + args.trials):
                found.append([])
                for name, words in compared.items():
                    found[-1].append(_accuracies(args, name, words, trial, data, Path(folder)))
                    shown.advance()
                _report(comparison, list(compared), 100 * np.array(found), args, output_dir)  # for this takes long


def _report(comparison: str, names: Sequence[str], found: np.ndarray, args: Namespace, output_dir: Path) -> None:
    """Writes the table of the trials so far; `found`: [trials, ways, 2] in %."""
    of = f"{args.dataset} ({how_many(args.per_class)})"
    title = f"Accuracy by implementation on {of}, {args.algorithm}, {args.backbone}, {args.steps} steps, in %"
    differences = found - found[:, :1]
    rows: list[dict[str, Any]] = []
    for way, name in enumerate(names):
        rows.append({"way": name})
        for i, column in enumerate(("in domain", "out of domain")):
            rows[-1][column] = _mean(found[:, way, i])
            rows[-1][f"{column}, difference"] = _mean(differences[:, way, i]) if way else None
    notes = [
        f"Hyperparameters {args.hparams}; environment {args.test_env} held out; mean and standard error over "
        f"{len(found)} trial(s), from trial {args.first_trial} on; differences are paired by trial."
    ]
    for way, name in enumerate(names[1:], 1):
        by_trial = ", ".join(f"{difference:.1f}" for difference in differences[:, way, 1])
        notes.append(f"Out of domain, difference by trial, {name}: {by_trial}.")
    report.write(f"accuracy_{comparison}", title, rows, output_dir, notes)


def _ways(hparams: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """By comparison its ways, by name the words of a command; the first is the one that others are held against."""
    plain, train, bf16 = ["domainbed_ext.bench.plain"], ["domainbed_ext.train"], ["--precision", "bf16"]
    ours = [*train, "--validation_images", "augmented"]  # as the plain way looks at them
    small = [*train, "--hparams", json.dumps({**hparams, "image_size": SMALL})]
    return {
        "all": {
            "plain, float32": plain,
            "ours, float32": [*ours, "--precision", "float32"],
            "ours, defaults": ours,
        },
        "images": {"plain, bf16": [*plain, *bf16], "ours, bf16": [*ours, *bf16]},
        "resized": {
            f"ours, images of {SMALL} px": small,
            "ours, --training_images resized": [*small, "--training_images", "resized"],
        },
    }


COMPARISONS = tuple(_ways({}))


def _accuracies(
    args: Namespace, name: str, words: list[str], trial: int, data: Path, folder: Path
) -> tuple[float, float]:
    """In-domain and out-of-domain accuracy of the last step."""
    place = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = [sys.executable, "-m", words[0], *subprocesses.arguments(args, "--data_dir", str(data))]
    command += ["--test_envs", str(args.test_env), "--trial_seed", str(trial), "--seed", str(trial)]
    command += ["--checkpoint_freq", "0", "--cache_dir", str(folder / "cache"), "--skip_model_save"]
    command += ["--train_eval_share", "0.01"]  # of which nothing is read
    command += ["--threads", str(count_available_cores()), *words[1:], "--output_dir", str(place)]
    subprocesses.run(name, command)
    record = RunFolder(place).records()[-1]
    return validation_accuracy(record), target_accuracy(record, args.test_env)


def _mean(values: np.ndarray) -> str:
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.1f}±{error:.1f}"
