"""What a run prints of itself: a header, a line for each record, and how it ended. Records hold all of it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed_ext.divergence import is_diverged
from domainbed_ext.model_selection import Record, best_step, target_accuracy
from domainbed_ext.runs.clock import RunTime
from domainbed_ext.runs.setup import Setup
from domainbed_ext.system.progress import format_duration


def header(facts: Mapping[str, Any], setup: Setup) -> str:
    """What is about to run.

    Args:
        facts: What every record of the run says of it.
        setup: Parts of the run.
    """
    args, hparams = facts["args"], facts["hparams"]
    names, tested = facts["environments"], args["test_envs"]
    trained_on = [name for env, name in enumerate(names) if env not in tested]
    time = RunTime(setup)
    every = f"every {setup.checkpoint_freq} steps and at the last" if setup.checkpoint_freq else "at the last"
    fewer = f", at least {time.validation:,}" if args["evaluate"] == "lean" else ""
    chosen = ", ".join(
        f"{name}={value}" for name, value in sorted(hparams.items()) if name not in ("backbone", "weights", "precision")
    )
    return "\n".join(
        (
            f"{args['dataset']}: tests on {', '.join(names[env] for env in tested)}; trains on {', '.join(trained_on)}",
            f"{args['algorithm']} on {hparams['backbone']} in {facts['precision']}: "
            f"{facts['trainable_parameters']:,} of {facts['total_parameters']:,} parameters train",
            f"{setup.steps} steps of {len(trained_on)} x {hparams['batch_size']} images, seed {args['seed']}; "
            f"evaluates {every} (up to {time.validation + time.others:,} images{fewer})",
            f"hyperparameters: {chosen}",
        )
    )


def line(record: Record, steps: int, seconds: float) -> str:
    """A record: step, loss, time, and accuracies by environment.

    Args:
        record: What was recorded.
        steps: Number of the run's steps.
        seconds: Time since the run began.
    """
    loss = record.get("loss")
    parts = [f"step {record['step']:{len(str(steps - 1))}d}"]
    parts += [] if loss is None else [f"loss {loss:.3f}"]
    parts += [format_duration(seconds)]
    for env, name in enumerate(record["environments"]):
        values = [
            f"{split} {record[key]:.3f}" for split in ("in", "out", "uda") if (key := f"env{env}_{split}_acc") in record
        ]
        tested = " (test)" if env in record["args"]["test_envs"] else ""
        parts += [f"{name}{tested} {' '.join(values)}"] if values else []
    return "  ".join(parts)


def result(records: Sequence[Record]) -> str:
    """The accuracy of a run on what it was tested on: "tested on A: 73.1 % at step 200".

    Args:
        records: All of the run.

    Raises:
        BenchmarkError: An accuracy is missing.
    """
    best = best_step(records)
    names = best.get("environments")
    accuracies = [
        f"{names[env] if names else f'environment {env}'}: {_percent(target_accuracy(best, env))}"
        for env in best["args"]["test_envs"]
    ]
    diverged = " (the run diverged)" if any(map(is_diverged, records)) else ""
    return f"tested on {', '.join(accuracies)} at step {best['step']}{diverged}"


def _percent(accuracy: float) -> str:
    return "not known" if math.isnan(accuracy) else f"{100 * accuracy:.1f} %"


def closing(records: Sequence[Record], folder: Path) -> str:
    """How a run ended: what was tested, the result, and where the model lies.

    Args:
        records: All of the run.
        folder: The run's.
    """
    saved = folder / "selected"
    where = f"the model is in {saved}" if saved.is_dir() else "the model was not saved"
    return f"done: {result(records)}, which training-domain validation selects; {where}"
