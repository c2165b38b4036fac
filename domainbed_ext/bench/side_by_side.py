"""Parallel runs on one device, each in its own process, compared with a single one: how many saturate it."""

import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

from domainbed_ext.bench import report, subprocesses, timing
from domainbed_ext.system.threads import map_in_threads
from vitlorafa.bench.tables import Row


def measure(args: Namespace, output_dir: Path) -> None:
    """Times parallel runs, of one trial each, prints a table and writes it.

    Args:
        args: Arguments of `python -m domainbed_ext.bench`.
        output_dir: Folder for the table.

    Raises:
        BenchmarkError: If one of the runs failed.
    """
    words = [sys.executable, "-m", "domainbed_ext.train", *subprocesses.arguments(args)]
    words += ["--checkpoint_freq", "0", "--train_eval_share", "0.05", "--skip_model_save", "--save_minutes", "0"]
    with tempfile.TemporaryDirectory() as folder:
        names = count()

        def together(runs: int) -> None:
            commands = [
                [*words, "--trial_seed", str(trial), "--output_dir", str(Path(folder, str(next(names))))]
                for trial in range(runs)
            ]
            map_in_threads(partial(subprocesses.run, f"of {runs} at once"), commands, runs)

        functions = {str(runs): partial(together, runs) for runs in args.at_once}
        title = f"Parallel runs on {args.dataset}, {args.algorithm}, {args.backbone}, {args.steps} steps"
        notes = (f"Hyperparameters {args.hparams}; one thread each; {args.rounds} interleaved round(s), start to end.",)

        def save(seconds: dict[str, list[float]], show: bool = False) -> None:
            report.write("side_by_side", title, _rows(seconds), output_dir, notes, show=show)

        # A round to warm up puts the images into the cache.
        save(timing.interleaved(functions, args.rounds, warm_up=not args.no_warm_up, after=save), show=True)


def _rows(seconds: Mapping[str, list[float]]) -> list[Row]:
    """A row for each number of runs that has been timed."""
    first = next(iter(seconds))
    return [
        {
            "runs at once": int(name),
            "seconds": round(median(times), 1),
            "fastest": round(min(times), 1),
            "runs an hour": round(3600 * int(name) / median(times), 1),
            f"× {first} at once": round(int(name) / int(first) / timing.ratio(seconds, name, first), 2),
        }
        for name, times in seconds.items()
        if times
    ]
