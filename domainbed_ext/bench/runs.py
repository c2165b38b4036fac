"""A whole run, ours against the plain way (`domainbed_ext.bench.plain`) and, given a checkout, upstream DomainBed.

The same data set, backbone, method, steps and checkpoints, each a process of its own from start to end, in turns. A
part of the data set is linked into a temporary folder, for the plain ways evaluate all of it again and again.
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
from domainbed_ext.system.machine import available_cores


def measure(args: Namespace, output_dir: Path) -> None:
    """Times the runs, prints a table and writes it.

    Args:
        args: of `python -m domainbed_ext.bench`.
        output_dir: of the table.

    Raises:
        BenchmarkError: one of the runs failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = link_part(args.dataset, args.data_dir, args.per_class, Path(folder, "data"))
        commands = _commands(args, data, Path(folder))
        functions = {name: lambda words=words, name=name: _run(name, words) for name, words in commands.items()}
        timing.interleaved(
            functions, args.rounds, warm_up=False, after=lambda seconds: _report(seconds, args, output_dir)
        )


def _report(seconds: dict[str, list[float]], args: Namespace, output_dir: Path) -> None:
    """Writes the table of the rounds so far, for they take long."""
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
    said = (
        f"Hyperparameters {args.hparams}; evaluated every {args.checkpoint_freq} steps and at the last; "
        f"{available_cores()} threads each; {len(seconds['plain'])} round(s) in turns, process start to end."
    )
    against = "upstream_" if args.checkout else ""
    report.write(f"run_{against}{args.algorithm}", title, rows, output_dir, (said,))


def _commands(args: Namespace, data: Path, folder: Path) -> dict[str, list[str]]:
    """What is compared, by name."""
    cores = available_cores()
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
    """From nothing: a folder with a finished run would take no time, and nor does a cache that was filled."""
    remove(Path(words[words.index("--output_dir") + 1]))
    if "first" in name:
        remove(Path(words[-1]))
    subprocesses.run(name, words)
