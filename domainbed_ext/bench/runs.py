"""A whole run, compared with the plain implementation (`domainbed_ext.bench.plain`) and, given a checkout, DomainBed.

The same data set, backbone, method, steps and checkpoints, each in its own process from start to end, interleaved. They
use a part of the data set, linked into a temporary folder: the others evaluate all of it at every checkpoint. All are
compared with the matmul lower bound of the defaults too (`domainbed_ext.bench.lower_bound`).
"""

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from domainbed_ext.algorithms.names import canonical_name
from domainbed_ext.bench import report, subprocesses, timing
from domainbed_ext.bench.lower_bound import LowerBound, measure_lower_bound
from domainbed_ext.bench.small_data import how_many, link_part
from domainbed_ext.bench.targets import choose_targets, describe_targets, judge
from domainbed_ext.bench.watching import watched
from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.runs.arguments import parse
from domainbed_ext.runs.setup import set_up
from domainbed_ext.system.files import remove
from domainbed_ext.system.machine import count_available_cores

WAYS = {
    "plain": "plain",
    "upstream": "upstream",
    "float32": "--protocol domainbed, float32",
    "bf16": "--protocol domainbed --precision bf16",
    "first": "defaults, the first of a sweep",
    "defaults": "defaults",
}
"""The label in tables of each way to run, in the order of measuring, by its name in `--ways`."""

_CACHED = ("float32", "bf16", "defaults")  # ways that find their images in the cache


def measure(args: Namespace, output_dir: Path) -> None:
    """Times the runs, prints a table and writes it.

    Args:
        args: Arguments of `python -m domainbed_ext.bench`.
        output_dir: Folder for the table.

    Raises:
        BenchmarkError: If there is no such way, or one of the runs failed.
    """
    ways = choose_ways(args.ways, args.checkout)
    with tempfile.TemporaryDirectory() as folder:
        data = link_part(args.dataset, args.data_dir, args.per_class, Path(folder, "data"))
        commands = _commands(args, data, Path(folder))
        defaults = commands["defaults"]
        bound = measure_lower_bound(set_up(parse(defaults[3:]), recorded_hparams={"weights": "none"}))
        if set(ways) & set(_CACHED):
            _run("filling the cache", [*defaults, "--steps", "1", "--checkpoint_freq", "0"], 1)
        functions = {name: lambda name=name: _run(name, commands[name], args.steps) for name in ways}
        table = _Table(args, output_dir, bound)
        seconds = timing.interleaved(functions, args.rounds, warm_up=False, after=table.write, unit="runs")
    table.write(seconds, show=True)


def choose_ways(asked: Iterable[str] | None, checkout: str | None) -> list[str]:
    """The names of the ways that are measured, in the order of `WAYS`.

    Args:
        asked: Names that were asked for; None for all that are possible.
        checkout: Checkout of upstream DomainBed; None if there is none.

    Raises:
        BenchmarkError: If there is no such way, or upstream is asked for without a checkout.
    """
    for name in asked or ():
        if name not in WAYS:
            raise unknown("way in --ways", name, WAYS)
    if asked and "upstream" in asked and not checkout:
        raise BenchmarkError("--ways upstream needs a checkout of DomainBed: add --checkout DIR")
    return [name for name in WAYS if (name in asked if asked else name != "upstream" or checkout)]


class _Table:
    """The table of the runs so far.

    Args:
        args: Arguments of `python -m domainbed_ext.bench`.
        output_dir: Folder for the table.
        bound: Lower bound of the run.
    """

    def __init__(self, args: Namespace, output_dir: Path, bound: LowerBound) -> None:
        self.args, self.output_dir, self.bound = args, output_dir, bound

    def write(self, seconds: dict[str, list[float]], show: bool = False) -> None:
        """Writes it: after each run, since a round takes long.

        Args:
            seconds: Seconds of the runs so far, by way.
            show: Whether it is printed too.
        """
        args = self.args
        against = "upstream_" if "upstream" in seconds else ""
        of = f"{args.dataset} ({how_many(args.per_class)})"
        title = f"A whole run on {of}, {args.algorithm}, {args.backbone}, {args.steps} steps"
        rounds = [len(times) for times in seconds.values()]
        done = f"{args.rounds}" if min(rounds) == args.rounds else f"{min(rounds)} to {max(rounds)} of {args.rounds}"
        notes = [
            f"Hyperparameters {args.hparams}; evaluated every {args.checkpoint_freq} steps and at the last; "
            f"{count_available_cores()} threads each; {done} interleaved round(s), process start to end. All but the "
            "first of a sweep find their images in the cache.",
            self.bound.describe(),
            *self._target(seconds),
        ]
        report.write(f"run_{against}{args.algorithm}", title, self._rows(seconds), self.output_dir, notes, show)

    def _rows(self, seconds: dict[str, list[float]]) -> list[dict[str, object]]:
        others = [name for name in ("upstream", "plain") if name in seconds]
        return [
            {
                "way": WAYS[name],
                "seconds": round(median(times), 1),
                "fastest": round(min(times), 1),
                **{
                    f"× {other}": round(1 / timing.ratio(seconds, name, other), 2) if seconds[other] else None
                    for other in others
                },
                "× lower bound": round(median(times) / self.bound.seconds, 1),
            }
            for name, times in seconds.items()
            if times
        ]

    def _target(self, seconds: dict[str, list[float]]) -> list[str]:
        """The sentences about the target, if what it is about was measured."""
        targets = choose_targets(self.bound.rates, report.device())
        if targets is None or not (seconds.get("defaults") and seconds.get("upstream")):
            return []
        least = targets.probe if canonical_name(self.args.algorithm) == "LP" else targets.run
        ratio = 1 / timing.ratio(seconds, "defaults", "upstream")
        verdict = "met" if judge(ratio, least=least)["met"] == "yes" else "not met"
        compared = f"Defaults over upstream: {ratio:.2f} ×, target {least} × {verdict}."
        return [f"{describe_targets(targets, self.bound.rates)} {compared}"]


def _commands(args: Namespace, data: Path, folder: Path) -> dict[str, list[str]]:
    """The command of every way, by its name."""
    cores = count_available_cores()
    hparams = {"backbone": args.backbone, "weights": args.weights, **json.loads(args.hparams)}
    float32 = json.dumps({**hparams, "precision": "float32"})
    shared = ["--dataset", args.dataset, "--data_dir", str(data), "--algorithm", args.algorithm, "--test_envs", "0"]
    shared += ["--steps", str(args.steps), "--checkpoint_freq", str(args.checkpoint_freq), "--skip_model_save"]
    ours = [*shared, "--threads", str(cores), "--hparams", json.dumps(hparams), "--save_minutes", "0"]

    def command(name: str, module: str, *words: str) -> list[str]:
        return [sys.executable, "-m", f"domainbed_ext.{module}", *words, "--output_dir", str(folder / name)]

    train, cache = ["train", *ours, "--cache_dir"], str(folder / "cache")
    same = ["--protocol", "domainbed", "--precision"]
    return {
        "plain": command("plain", "bench.plain", *ours),
        "upstream": command(
            "upstream", "upstream", "--checkout", str(args.checkout), "train", *shared, "--hparams", float32
        ),
        "float32": command("float32", *train, cache, *same, "float32"),
        "bf16": command("bf16", *train, cache, *same, "bf16"),
        "first": command("first", *train, str(folder / "empty")),
        "defaults": command("defaults", *train, cache),
    }


def _run(name: str, words: list[str], steps: int) -> None:
    """Runs a command without the folder of a finished run and, as the first of a sweep, without a cache."""
    place = _value(words, "--output_dir")
    remove(place)
    if name == "first":
        remove(_value(words, "--cache_dir"))
    with watched(name, place, steps):
        subprocesses.run(WAYS.get(name, name), words)


def _value(words: list[str], option: str) -> Path:
    return Path(words[words.index(option) + 1])
