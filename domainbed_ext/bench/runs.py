"""A whole run, compared with the plain implementation (`domainbed_ext.bench.plain`) and, given a checkout, DomainBed.

The same data set, backbone, method, steps and checkpoints, each in its own process from start to end, interleaved. They
use a part of the data set, linked into a temporary folder: the others evaluate all of it at every checkpoint.
"""

import json
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from statistics import median

from domainbed_ext.bench import report, subprocesses, timing
from domainbed_ext.bench.small_data import how_many, link_part
from domainbed_ext.system.files import remove
from domainbed_ext.system.machine import count_available_cores


def measure(args: Namespace, output_dir: Path) -> None:
    """Times the runs, prints a table and writes it.

    Args:
        args: Arguments of `python -m domainbed_ext.bench`.
        output_dir: Folder for the table.

    Raises:
        BenchmarkError: If one of the runs failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = link_part(args.dataset, args.data_dir, args.per_class, Path(folder, "data"))
        commands = _commands(args, data, Path(folder))
        functions = {name: lambda words=words, name=name: _run(name, words) for name, words in commands.items()}
        timing.interleaved(
            functions, args.rounds, warm_up=False, after=lambda seconds: _report(seconds, args, output_dir)
        )


def _report(seconds: dict[str, list[float]], args: Namespace, output_dir: Path) -> None:
    """Writes the table after each round: rounds take long."""
    slowest = "upstream" if "upstream" in seconds else "plain"
    rows = [
        {
            "way": name,
            "seconds": round(median(times), 1),
            "fastest": round(min(times), 1),
            **{
                f"× {other}": round(1 / timing.ratio(seconds, name, other), 2)
                for other in dict.fromkeys((slowest, "plain"))
            },
        }
        for name, times in seconds.items()
    ]
    of = f"{args.dataset} ({how_many(args.per_class)})"
    title = f"A whole run on {of}, {args.algorithm}, {args.backbone}, {args.steps} steps"
    note = (
        f"Hyperparameters {args.hparams}; evaluated every {args.checkpoint_freq} steps and at the last; "
        f"{count_available_cores()} threads each; {len(seconds['plain'])} interleaved round(s), process start to end."
    )
    against = "upstream_" if args.checkout else ""
    report.write(f"run_{against}{args.algorithm}", title, rows, output_dir, (note,))


def _commands(args: Namespace, data: Path, folder: Path) -> dict[str, list[str]]:
    """The commands that are compared, by name."""
    cores = count_available_cores()
    hparams = {"backbone": args.backbone, "weights": args.weights, **json.loads(args.hparams)}
    shared = ["--dataset", args.dataset, "--data_dir", str(data), "--algorithm", args.algorithm, "--test_envs", "0"]
    shared += ["--steps", str(args.steps), "--checkpoint_freq", str(args.checkpoint_freq)]
    threads = ["--threads", str(cores), "--hparams", json.dumps(hparams), "--cache_dir", str(folder / "cache")]
    ours = [*shared, *threads, "--skip_model_save", "--save_minutes", "0", "--output_dir"]
    train = [sys.executable, "-m", "domainbed_ext.train", *ours]
    found = {"plain": [sys.executable, "-m", "domainbed_ext.bench.plain", *ours, str(folder / "plain")]}
    if args.checkout:
        upstream = [sys.executable, "-m", "domainbed_ext.upstream", "--checkout", args.checkout, "train", *shared]
        float32 = json.dumps({**hparams, "precision": "float32"})
        found["upstream"] = [*upstream, "--hparams", float32, "--skip_model_save", "--output_dir", str(folder / "up")]
    same = ["--protocol", "domainbed", "--precision"]
    found["--protocol domainbed, float32"] = [*train, str(folder / "float32"), *same, "float32"]
    found["--protocol domainbed --precision bf16"] = [*train, str(folder / "bf16"), *same, "bf16"]
    found["defaults, the first of a sweep"] = [*train, str(folder / "first"), "--cache_dir", str(folder / "empty")]
    found["defaults"] = [*train, str(folder / "defaults")]
    return found


def _run(name: str, words: list[str]) -> None:
    """Runs a command without the folder of a finished run and, as the first of a sweep, without a cache."""
    remove(Path(words[words.index("--output_dir") + 1]))
    if "first" in name:
        remove(Path(words[-1]))
    subprocesses.run(name, words)
