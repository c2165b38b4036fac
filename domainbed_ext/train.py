"""One run: trains an algorithm on all environments but the test ones, and records its accuracy on every split.

python -m domainbed_ext.train --algorithm BOnly --test_envs 0 --output_dir runs/one
"""

import argparse
import json
import shutil
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from domainbed_ext.algorithms import Algorithm
from domainbed_ext.data import training_stream
from domainbed_ext.errors import BenchmarkError, exit_cleanly
from domainbed_ext.model_selection import better
from domainbed_ext.options import make_parser
from domainbed_ext.provenance import machine, versions
from domainbed_ext.records import RunFolder, State
from domainbed_ext.run_setup import Setup, compute_exactly, set_up
from domainbed_ext.seeds import seed_hash
from vitlorafa import count_parameters


def train(setup: Setup, folder: RunFolder, progress: Callable[[float], None]) -> None:
    """Trains, evaluates, records and saves.

    Args:
        setup: the run's parts.
        folder: started.
        progress: told the share of the steps that are done.
    """
    args, hparams = setup.args, setup.hparams
    compute_exactly(args)
    algorithm = setup.make_algorithm()
    trainable, total = count_parameters(algorithm)
    facts = {
        "args": vars(args),
        "hparams": hparams,
        "environments": list(setup.dataset.environments),
        "split_sizes": {name: len(split) for name, split in setup.splits.items()},
        "precision": algorithm.precision,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "versions": versions(),
        "machine": machine(),
    }
    print(json.dumps(facts, indent=2, sort_keys=True))

    every_in = [len(setup.splits[f"env{i}_in"]) for i in range(len(setup.dataset))]
    steps_per_epoch = min(every_in) / hparams["batch_size"]
    validation = [f"env{i}_out" for i in setup.train_envs]
    others = [name for name in setup.splits if name not in validation]
    best: float | None = None
    values = defaultdict(list)
    stream = training_stream(setup.minibatches(), range(setup.steps), args.workers)
    for step in range(setup.steps):
        start = time.perf_counter()
        batches = next(stream)
        torch.manual_seed(seed_hash(args.seed, "update", step))  # so that step t needs no history (dropout)
        for name, value in algorithm.update(batches).items():
            values[name].append(value)
        values["step_time"].append(time.perf_counter() - start)
        progress((step + 1) / setup.steps)

        last = step == setup.steps - 1
        if not (last or (setup.checkpoint_freq and step % setup.checkpoint_freq == 0)):
            continue
        accuracies = setup.accuracies(algorithm, step, validation)
        val_acc = float(np.mean(list(accuracies.values())))
        # Every figure is read from the best step or from the last, which lean evaluation relies on.
        if new_best := better(val_acc, best):
            best = val_acc
        if new_best or last or args.evaluate == "all":
            accuracies |= setup.accuracies(algorithm, step, others)
        folder.append(
            {
                **facts,
                **{name: float(np.mean(history)) for name, history in values.items()},
                **accuracies,
                "step": step,
                "epoch": step / steps_per_epoch,
                "mem_gb": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
            }
        )
        print(f"step {step:5d}", *(f"{name} {value:.3f}" for name, value in sorted(accuracies.items())))
        values.clear()
        if args.skip_model_save:
            continue
        if new_best:
            _save(algorithm, folder.path / "selected")
        elif last:
            _save(algorithm, folder.path / "last")
        if args.save_model_every_checkpoint:
            _save(algorithm, folder.path / f"step_{step}")


def _save(algorithm: Algorithm, path: Path) -> None:
    """Saves whole or not at all."""
    partial = path.with_name(f".{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    algorithm.save(partial)
    shutil.rmtree(path, ignore_errors=True)
    partial.replace(path)


def run(args: argparse.Namespace, progress: Callable[[float], None]) -> int:
    """A run from its arguments to its `done` or `failed`.

    Args:
        args: of `options.make_parser`.
        progress: told the share of the steps that are done.

    Returns:
        Exit code: 0 for done, 2 for a mistake in the input, 1 for anything else that failed.
    """
    folder = RunFolder(args.output_dir)
    if folder.state is State.DONE:
        raise BenchmarkError(f"{folder.path} holds a finished run: give another --output_dir, or delete it")
    folder.start()
    with folder.log():
        try:
            train(set_up(args), folder, progress)
            folder.finish()
        except BenchmarkError as error:
            folder.fail(str(error), exit_code=2)
            print(f"error: {error}", file=sys.stderr)
            return 2
        except Exception as error:
            traceback.print_exc()
            folder.fail(f"{type(error).__name__}: {error}", exit_code=1)
            return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.train`."""
    args = make_parser().parse_args(argv)
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{args.dataset} {args.algorithm}", total=100)
        return run(args, lambda share: bar.update(task, completed=round(100 * share)))


if __name__ == "__main__":
    exit_cleanly(main)
