"""The lines that a run prints: a header, a line for each record, and its result. Records hold all of it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed_ext.divergence import is_diverged
from domainbed_ext.hparams_registry import OPTIONS, without_later_defaults
from domainbed_ext.model_selection import SPLITS, Record, accuracy, best_step, target_accuracy
from domainbed_ext.runs.remaining_time import FORWARD, RemainingTime
from domainbed_ext.runs.setup import Setup
from domainbed_ext.system.progress import format_duration


def format_header(facts: Mapping[str, Any], setup: Setup) -> str:
    """Formats what is about to run.

    Args:
        facts: Facts that every record of the run holds.
        setup: Parts of the run.
    """
    args, hparams = facts["args"], facts["hparams"]
    names = facts["environments"]
    tested = [names[env] for env in setup.test_envs]
    trained = [names[env] for env in setup.train_envs]
    shown = without_later_defaults(hparams, args["algorithm"], args["dataset"])
    chosen = ", ".join(f"{name}={value}" for name, value in sorted(shown.items()) if name not in OPTIONS)
    parts = f" in {hparams['accumulate']} parts" if hparams.get("accumulate", 1) > 1 else ""
    return "\n".join(
        (
            f"{args['dataset']}: tests on {', '.join(tested)}; trains on {', '.join(trained)}",
            f"{args['algorithm']} on {hparams['backbone']} in {facts['precision']}: "
            f"{facts['trainable_parameters']:,} of {facts['total_parameters']:,} parameters train",
            f"{setup.steps} steps of {len(trained)} x {setup.images_a_domain} images{parts}, seed {args['seed']}; "
            f"{format_evaluation(setup)}",
            f"hyperparameters: {chosen}",
        )
    )


def format_evaluation(setup: Setup) -> str:
    """Formats what evaluation will cost: how often, how many images, and how to lower that where it matters.

    Args:
        setup: Parts of the run.
    """
    time = RemainingTime(setup)
    times, images = time.count_evaluations(0), time.count_images(0)
    is_lean = setup.args.evaluate == "lean" and times > 1
    when = "at the last step" if times == 1 else f"{times} times"
    trained = setup.steps * setup.images_a_step
    options = ["--train_eval_share"] if setup.args.train_eval_share == 1 else []
    fewer = "--evaluations 1" if setup.args.evaluations else "--checkpoint_freq 0"
    options += [fewer] if times > 1 else []
    costs_more = images * FORWARD > trained and options
    hint = (
        f", longer than training: {' and '.join(options)} shorten{'s' * (len(options) == 1)} it" if costs_more else ""
    )
    return f"evaluates {when}, {'at most ' if is_lean else ''}{images:,} images in all{hint}"


def format_record(record: Record, steps: int, seconds: float) -> str:
    """Formats a record: step, loss, time, and accuracies by environment.

    Args:
        record: Record of the run.
        steps: Number of the run's steps.
        seconds: Time since the run began.
    """
    loss = record.get("loss")
    parts = [_format_step(record["step"], steps)]
    parts += [] if loss is None else [f"loss {loss:.3f}"]
    parts += [format_duration(seconds)]
    for env, name in enumerate(record["environments"]):
        values = [
            f"{split} {accuracy(record, env, split):.3f}" for split in SPLITS if f"env{env}_{split}_acc" in record
        ]
        tested = " (test)" if env in record["args"]["test_envs"] else ""
        parts += [f"{name}{tested} {' '.join(values)}"] if values else []
    return "  ".join(parts)


def format_loss(step: int, loss: float, steps: int, seconds: float) -> str:
    """Formats an evaluation of the validation loss alone.

    Args:
        step: Index of the step.
        loss: Mean validation loss.
        steps: Number of the run's steps.
        seconds: Time since the run began.
    """
    return "  ".join((_format_step(step, steps), f"validation loss {loss:.4f}", format_duration(seconds)))


def _format_step(step: int, steps: int) -> str:
    return f"step {step:{len(str(steps - 1))}d}"


def format_result(records: Sequence[Record]) -> str:
    """Formats the test accuracy of a run: "tested on A: 73.1 % at step 200".

    Args:
        records: All records of the run.

    Raises:
        BenchmarkError: An accuracy is missing.
    """
    best = best_step(records)
    names = best.get("environments")
    accuracies = [
        f"{names[env] if names else f'environment {env}'}: {_format_percent(target_accuracy(best, env))}"
        for env in best["args"]["test_envs"]
    ]
    diverged = " (the run diverged)" if any(map(is_diverged, records)) else ""
    return f"tested on {', '.join(accuracies)} at step {best['step']}{diverged}"


def _format_percent(accuracy: float) -> str:
    return "unknown" if math.isnan(accuracy) else f"{100 * accuracy:.1f} %"


def format_closing(records: Sequence[Record], folder: Path) -> str:
    """Formats how a run ended: the result, and where the model is.

    Args:
        records: All records of the run.
        folder: Folder of the run.
    """
    saved = folder / "selected"
    where = f"the model is in {saved}" if saved.is_dir() else "the model was not saved"
    return f"done: {format_result(records)}, selected by training-domain validation; {where}"
