"""Compares numbers of ours with upstream DomainBed's own code: python tests/compat/compare.py CHECKOUT.

Everything that both packages compute from the same input is computed by both: seeds, splits, hyperparameters, jobs,
command lines, images, the records of short runs, and, on generated sweeps, model selection and tables. What differs on
purpose is counted under a name; exit code 1 if anything else does.
"""

import argparse
import collections
import contextlib
import importlib
import io
import itertools
import json
import math
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from domainbed_ext import collect_results, hparams_registry, train, upstream
from domainbed_ext.data.augmentation import AUGMENTATIONS
from domainbed_ext.data.splits import holdout_split, split
from domainbed_ext.datasets import DATASETS, get_dataset_class
from domainbed_ext.model_selection import SELECTION_METHODS, group_records
from domainbed_ext.models.inputs import Inputs
from domainbed_ext.report.leave_one_out import averages_table, domain_table
from domainbed_ext.report.results import Results
from domainbed_ext.report.summary import DIVERGED
from domainbed_ext.runs import arguments
from domainbed_ext.runs.images import Augmented, Uncached
from domainbed_ext.seeds import seed_hash
from domainbed_ext.sweep import jobs as sweep_jobs
from domainbed_ext.sweep import options as sweep_options
from domainbed_ext.sweep.arguments import parse
from domainbed_ext.system.command_line import exit_cleanly

DELIBERATE = {
    "nan": "upstream: a NaN validation accuracy wins if the run's first step has it; here: it ranks below any number",
    "diverged": 'upstream prints "nan" for an accuracy that is not known; here: "diverged"',
    "networks": "upstream's hyperparameters of its own networks (resnet18, vit, ...); here: the backbone is timm's",
    "folders": "upstream's hash of a run's arguments names its folder; here, what it computes does",
    "ours": "hyperparameters, options and record fields that upstream does not have",
    "defaults": "what a command does that is not told: the quickstart here, every algorithm and data set there",
    "auto_lr": "upstream's collect_results --auto_lr, for one algorithm's own training script",
    "uda": "upstream numbers the splits for adaptation among themselves; here: env1_uda is of environment 1",
    "model": "upstream saves the last step's model.pkl; here: what was trained, at the selected step",
}
NETWORKS = {"dinov2", "freeze_bn", "lars", "linear_steps", "resnet18", "resnet50_augmix", "vit", "vit_attn_tune"}
SIZES = {
    "VLCS": (1415, 2656, 3282, 3376),
    "PACS": (2048, 2344, 1670, 3929),
    "OfficeHome": (2427, 4365, 4439, 4357),
    "TerraIncognita": (4741, 9736, 3970, 5883),
    "Debug28": (16, 16, 16),
}
ENVIRONMENTS = {"ColoredMNIST": 3, "VLCS": 4, "PACS": 4, "OfficeHome": 4, "TerraIncognita": 4, "DomainNet": 6}
DEFAULTS = {
    *("train --dataset", "train --algorithm", "train --test_envs"),  # the last: None is 0, or all but the source
    *("sweep --datasets", "sweep --algorithms", "sweep --command_launcher"),
}
GOLDEN = Path(__file__).with_name("golden.json")
GOLDEN_SEEDS = (14, 20)  # of sweeps with ties and many hyperparameters, and with gaps
UPSTREAM_METHODS = {
    "training-domain": "IIDAccuracySelectionMethod",
    "leave-one-domain-out": "LeaveOneOutSelectionMethod",
    "oracle": "OracleSelectionMethod",
}


class Report:
    """Counts what was compared, what was equal, and what differs on purpose."""

    def __init__(self) -> None:
        self.equal: collections.Counter[str] = collections.Counter()
        self.different: collections.Counter[str] = collections.Counter()
        self.deliberate: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.differences: list[str] = []

    def check(self, section: str, what: object, theirs: Any, ours: Any, unless: str | None = None) -> None:
        """Compares one thing; if it differs, `unless` names the reason that it may."""
        self.equal.setdefault(section, 0)
        if same(theirs, ours):
            self.equal[section] += 1
        elif unless:
            self.deliberate[section][unless] += 1
        else:
            self.different[section] += 1
            self.differences.append(f"{section}: {what}: upstream {theirs!r}, here {ours!r}")

    def show(self) -> None:
        print(f"{'':20}{'compared':>12}{'equal':>12}{'on purpose':>12}{'different':>12}")
        total = collections.Counter[str]()
        for section in self.equal:
            numbers = self.equal[section], self.deliberate[section].total(), self.different[section]
            total.update(dict(zip(("equal", "on purpose", "different"), numbers, strict=True)))
            print(f"{section:20}{sum(numbers):12,}" + "".join(f"{number:12,}" for number in numbers))
        print(f"{'in all':20}{total.total():12,}" + "".join(f"{number:12,}" for number in total.values()))
        for name in DELIBERATE:
            where = [f"{section} {count[name]:,}" for section, count in self.deliberate.items() if count[name]]
            if where:
                print(f"on purpose: {name} ({', '.join(where)}): {DELIBERATE[name]}")
        for difference in self.differences[:20]:
            print(f"DIFFERENT: {difference}")
        print(f"{len(self.differences):,} differences that are not on purpose")


def same(theirs: Any, ours: Any) -> bool:
    """Equal, numbers to 1e-9 and NaN to itself, of the same type but for integers and floats."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return theirs.keys() == ours.keys() and all(same(theirs[key], ours[key]) for key in theirs)
    if isinstance(theirs, list | tuple) and isinstance(ours, list | tuple):
        return len(theirs) == len(ours) and all(map(same, theirs, ours))
    numbers = [isinstance(each, int | float) and not isinstance(each, bool) for each in (theirs, ours)]
    if all(numbers):
        return (math.isnan(theirs) and math.isnan(ours)) or math.isclose(theirs, ours, rel_tol=1e-9, abs_tol=1e-9)
    return type(theirs) is type(ours) and bool(theirs == ours)


def domainbed(name: str) -> Any:
    """A module of upstream's."""
    return importlib.import_module(f"domainbed.{name}")


def known_to_both() -> list[str]:
    return [name for name in domainbed("datasets").DATASETS if name in DATASETS]


# Seeds, splits, hyperparameters and jobs


def compare_seeds(report: Report, rng: np.random.RandomState) -> None:
    misc = domainbed("lib.misc")
    values = [0, 7, -1, 2**40, 0.1, "PACS", "BOnly@rank=16", [0], [1, 2], (), None, True]
    for _ in range(300):
        arguments = [values[i] for i in rng.randint(len(values), size=rng.randint(1, 6))]
        report.check("seed_hash", arguments, misc.seed_hash(*arguments), seed_hash(*arguments))


def compare_splits(report: Report) -> None:
    misc = domainbed("lib.misc")
    for (dataset, sizes), trial, fraction in itertools.product(SIZES.items(), range(3), (0.2, 0.35)):
        for environment, size in enumerate(sizes):
            what = f"{dataset} environment {environment} trial {trial} fraction {fraction}"
            seed = misc.seed_hash(trial, environment)
            out, kept = misc.split_dataset(range(size), int(size * fraction), seed)
            ours_out, ours_kept = holdout_split(size, fraction, trial, environment)
            report.check("splits", f"{what} out", out.keys, ours_out)
            report.check("splits", f"{what} in", kept.keys, ours_kept)
            # What a test environment gives to unsupervised adaptation is split off the `in` split.
            parts = misc.split_dataset(kept, int(len(kept) * fraction), seed)
            ours = split(ours_kept, int(len(ours_kept) * fraction), seed_hash(trial, environment))
            for name, theirs, mine in zip(("uda", "in of uda"), parts, ours, strict=True):
                report.check("splits", f"{what} {name}", [theirs[i] for i in range(len(theirs))], mine)


def compare_hparams(report: Report) -> None:
    registry = domainbed("hparams_registry")
    datasets = [name for name in domainbed("datasets").DATASETS if not name.startswith(("SVIRO", "WILDS", "Spaw"))]
    for dataset in datasets:
        pairs = {
            "default": (registry.default_hparams("ERM", dataset), hparams_registry.default_hparams("ERM", dataset))
        }
        for hparams_seed, trial in itertools.product(range(1, 21), range(3)):
            seed = seed_hash(hparams_seed, trial)
            drawn = (module.random_hparams("ERM", dataset, seed) for module in (registry, hparams_registry))
            pairs[f"hparams_seed {hparams_seed} trial {trial}"] = next(drawn), next(drawn)
        for which, (theirs, ours) in pairs.items():
            for name in theirs.keys() | ours.keys():
                unless = "ours" if name not in theirs else "networks" if name in NETWORKS else None
                report.check("hyperparameters", f"{dataset} {which} {name}", theirs.get(name), ours.get(name), unless)


SWEEPS = (
    "--algorithms ERM --n_trials 2 --n_hparams 2",
    "--algorithms ERM BA BOnly@rank=16 --n_trials 1 --n_hparams 3 --single_test_envs",
    "--algorithms BOnly --n_trials 1 --n_hparams_from 2 --n_hparams 4 --steps 17 --holdout_fraction 0.3",
    """--algorithms LP --n_trials 2 --n_hparams 1 --single_test_envs --steps 5 --hparams '{"lr": 1e-3, "x": "a b"}'""",
    "--algorithms FullFT --n_trials 1 --n_hparams 1 --task domain_adaptation",
)


def parse_sweep(line: str, dataset: str) -> argparse.Namespace:
    words = ["launch", *shlex.split(line), "--data_dir", "/data sets", "--output_dir", "out", "--datasets", dataset]
    return parse(words)


def upstream_jobs(args: argparse.Namespace) -> list[Any]:
    script = domainbed("scripts.sweep")
    names = "n_trials algorithms n_hparams_from n_hparams steps data_dir task holdout_fraction single_test_envs hparams"
    listed = script.make_args_list(dataset_names=args.datasets, **{name: getattr(args, name) for name in names.split()})
    return [script.Job(train_args, args.output_dir) for train_args in listed]


def our_jobs(args: argparse.Namespace) -> list[sweep_jobs.Job]:
    """Ours, with upstream's tolerance of hyperparameters that nobody has."""
    with mock.patch.object(hparams_registry, "names", return_value={"x"}):
        return sweep_jobs.make_jobs(args)


def compare_jobs(report: Report) -> None:
    for line, dataset in itertools.product(SWEEPS, known_to_both()):
        args = parse_sweep(line, dataset)
        theirs, ours = upstream_jobs(args), our_jobs(args)
        report.check("jobs", f"{dataset} {line}: number", len(theirs), len(ours))
        for number, (job, mine) in enumerate(zip(theirs, ours, strict=False)):
            what = f"{dataset} {line}: job {number}"
            train_args = {name: value for name, value in job.train_args.items() if name != "output_dir"}
            for name in train_args.keys() | mine.train_args.keys():
                unless = None if name in train_args else "ours"
                report.check("jobs", f"{what} argument {name}", train_args.get(name), mine.train_args.get(name), unless)
            report.check("jobs", f"{what} folder", Path(job.output_dir).name, mine.domainbed_hash)
            command, mine_command = (options(shlex.split(text)) for text in (job.command_str, mine.command.text))
            for option in command.keys() | mine_command.keys():
                unless = "folders" if option == "--output_dir" else None if option in command else "ours"
                report.check("jobs", f"{what} {option}", command.get(option), mine_command.get(option), unless)


def options(words: list[str]) -> dict[str, list[str]]:
    """The options of a command line."""
    found: dict[str, list[str]] = {}
    for word in words[words.index("-m") + 2 :]:
        if word.startswith("--"):
            values = found.setdefault(word, [])
        else:
            values.append(word)
    return found


# Command lines


class _ParsedError(Exception):
    """Carries a parser out of a script that is about to use it."""


def parser_of(main: Callable[[], object]) -> argparse.ArgumentParser:
    def stop(parser: argparse.ArgumentParser, *args: object) -> None:
        raise _ParsedError(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            main()
        except _ParsedError as parsed:
            return parsed.args[0]
    raise AssertionError("the script did not parse its arguments")


def compare_arguments(report: Report) -> None:
    ours = {
        "train": arguments.make_parser(),
        "sweep": sweep_options.make_parser(),
        "collect_results": parser_of(collect_results.main),
    }
    for script, parser in ours.items():
        theirs = flags(parser_of(lambda script=script: upstream.run(script, [])))
        mine = flags(parser)
        for name in sorted(theirs.keys() | mine.keys()):
            what = f"{script} {name}"
            if name not in theirs or name not in mine:
                unless = "ours" if name in mine else "auto_lr" if name == "--auto_lr" else None
                report.check("command lines", what, name in theirs, name in mine, unless)
                continue
            unless = "defaults" if f"{script} {name}" in DEFAULTS else None
            for part in ("nargs", "dest"):
                report.check("command lines", what, *(getattr(each[name], part) for each in (theirs, mine)))
            report.check("command lines", f"{what} default", theirs[name].default, mine[name].default, unless)


def flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {flag: action for action in parser._actions for flag in action.option_strings or [action.dest]}


# Images and records


def make_pacs(root: Path) -> None:
    """A data set in the shape of PACS, of 4 environments of 2 × 10 images of several sizes."""
    rng = np.random.RandomState(0)
    for domain, label in itertools.product(("art_painting", "cartoon", "photo", "sketch"), ("dog", "house")):
        folder = root / "PACS" / domain / label
        folder.mkdir(parents=True)
        for number in range(10):
            size = (*rng.randint(30, 80, size=2), 3)
            Image.fromarray(rng.randint(256, size=size).astype(np.uint8)).save(folder / f"pic_{number:03d}.png")


def compare_datasets(report: Report) -> None:
    """What the classes of data sets say of themselves."""
    for name in known_to_both():
        theirs, ours = domainbed("datasets").get_dataset_class(name), get_dataset_class(name)
        report.check("data sets", f"{name} environments", list(theirs.ENVIRONMENTS), list(ours.ENVIRONMENTS))
        for attribute in ("N_STEPS", "CHECKPOINT_FREQ"):
            report.check("data sets", f"{name} {attribute}", getattr(theirs, attribute), getattr(ours, attribute))


def compare_images(report: Report, data_dir: Path) -> None:
    """Environments, labels and what evaluation makes of an image."""
    everything = range(4)  # all are test environments: upstream augments none
    theirs = domainbed("datasets").PACS(str(data_dir), everything, {"data_augmentation": True})
    ours = get_dataset_class("PACS")(data_dir, everything, {})
    report.check("images", "environments", len(theirs), len(ours))
    report.check("images", "classes", theirs.num_classes, ours.num_classes)
    report.check("images", "input_shape", theirs.input_shape, ours.input_shape)
    inputs = Inputs()
    for number, (environment, mine) in enumerate(zip(theirs, ours, strict=True)):
        report.check("images", f"environment {number} labels", environment.targets, list(map(int, mine.targets)))
        for key in (0, 13):
            images = Augmented(Uncached(mine), AUGMENTATIONS["none"], inputs.size).batch([key], np.random.default_rng())
            gap = (environment[key][0] - inputs.ready(images)[0]).abs().max().item()
            report.check("images", f"environment {number} image {key} to 1e-5", gap < 1e-5, True)


def compare_records(report: Report, data_dir: Path, folder: Path) -> None:
    """What a short run of each leaves behind."""
    hparams = {"backbone": "vit_pico_patch8_32", "weights": "none", "batch_size": 4}
    words = ["--dataset", "PACS", "--data_dir", str(data_dir), "--algorithm", "LP", "--hparams", json.dumps(hparams)]
    words += shlex.split("--steps 4 --checkpoint_freq 2 --test_envs 1 --trial_seed 1 --uda_holdout_fraction 0.25")
    upstream.set_workers(0)
    with contextlib.redirect_stdout(io.StringIO()):
        upstream.run("train", [*words, "--output_dir", str(folder / "theirs")])
        mine = [*words, "--evaluate", "all", "--output_dir", str(folder / "ours")]
        report.check("records", "exit code", 0, train.main(mine))
    found = []
    for side in ("theirs", "ours"):
        lines = (folder / side / "results.jsonl").read_text().splitlines()
        found.append([json.loads(each) for each in lines])
        for number, each in enumerate(lines):
            report.check(
                "records",
                f"{side}: keys of line {number} in order",
                json.dumps(found[-1][number], sort_keys=True),
                each,
            )
    report.check("records", "steps", *([record["step"] for record in records] for records in found))
    for number, (theirs, ours) in enumerate(zip(*found, strict=False)):
        for part, mine in ((theirs, ours), (theirs["args"], ours["args"]), (theirs["hparams"], ours["hparams"])):
            for name in part.keys() | mine.keys():
                unless = "ours" if name not in part or name == "input_stats" else "uda" if "_uda_" in name else None
                value, my_value = (kind(name, each.get(name)) for each in (part, mine))
                report.check("records", f"record {number} {name}", value, my_value, unless)
    for name in ("done", "err.txt", "out.txt", "results.jsonl", "model.pkl"):
        unless = "model" if name == "model.pkl" else None
        report.check("records", name, *((folder / side / name).exists() for side in ("theirs", "ours")), unless)
    report.check("records", "done", *((folder / side / "done").read_text() for side in ("theirs", "ours")))


def kind(name: str, value: Any) -> Any:
    """A value, or its type where it depends on what was drawn or how long it took, or is a path or a group."""
    measured = name.endswith(("_acc", "_dir", "_time", "_gb")) or name in ("loss", "args", "hparams")
    return type(value).__name__ if measured and value is not None else value


# Model selection and tables


def generate(rng: np.random.RandomState) -> list[dict[str, Any]]:
    """The records of one sweep, with all that can befall one: gaps, half runs, ties, NaN."""
    datasets = rng.choice(sorted(ENVIRONMENTS), rng.randint(1, 3), replace=False).tolist()
    names = ["ERM", "CORAL", "BA", "BOnly", "BOnly@rank=16", "LP", "Mine"]
    algorithms = rng.choice(names, rng.randint(1, 4), replace=False).tolist()
    hparams_seeds = rng.choice([0, 1, 2, 3, 10, 19], rng.randint(1, 4), replace=False).tolist()
    steps = [[0], [0, 300], [0, 100, 200, 250]][rng.randint(3)]
    gaps, halves, nans = (share if rng.rand() < 0.5 else 0 for share in (0.1, 0.1, 0.05))
    pairs, triples, ties = rng.rand() < 0.8, rng.rand() < 0.2, rng.rand() < 0.4
    order = 1 if rng.rand() < 0.7 else -1  # of the test environments of a pair

    def accuracy() -> float:
        if rng.rand() < nans:
            return math.nan
        return float(rng.choice([0.0, 0.25, 0.5, 1.0]) if ties else rng.randint(0, 1000) / 999)

    runs: list[list[dict[str, Any]]] = []
    for dataset, algorithm, trial in itertools.product(datasets, algorithms, range(rng.randint(1, 4))):
        count = ENVIRONMENTS[dataset]
        sizes = [1, *([2] if pairs else []), *([3] if triples and count > 3 else [])]
        for size, hparams_seed in itertools.product(sizes, hparams_seeds):
            for test_envs in itertools.combinations(range(count), size):
                if rng.rand() < gaps:
                    continue
                args = {"dataset": dataset, "algorithm": algorithm, "test_envs": list(test_envs)[::order],
                        "trial_seed": trial, "hparams_seed": hparams_seed, "holdout_fraction": 0.2}  # fmt: skip
                accuracies = [f"env{env}_{part}_acc" for env in range(count) for part in ("in", "out")]
                kept = steps[: rng.randint(1, len(steps) + 1)] if rng.rand() < halves else steps
                runs.append([{"args": args, "step": step, **{name: accuracy() for name in accuracies},
                              "run": f"run{len(runs):05d}", "hparams": {}} for step in kept])  # fmt: skip
    return [record for run in rng.permutation(len(runs)) for record in runs[run]]


class _Cell(str):
    """The text of upstream's cell, and the numbers behind it."""

    numbers: tuple[float | None, float | None]


def upstream_tables(records: list[dict[str, Any]], method: Any) -> Iterator[tuple[str, list[str], list[list[Any]]]]:
    """Upstream's tables: title, header and rows; cells keep their unrounded numbers."""
    scripts, query = domainbed("scripts.collect_results"), domainbed("lib.query")
    found, format_mean = [], scripts.format_mean

    def format_cell(data: Any, latex: bool) -> tuple[Any, Any, _Cell]:
        mean, err, text = format_mean(data, latex)
        cell = _Cell(text)
        cell.numbers = mean, err
        return mean, err, cell

    def keep(table: Any, header: str, rows: Any, columns: Any, **_: Any) -> None:
        found.append((header, columns, [[name, *row] for name, row in zip(rows, table, strict=True)]))

    with mock.patch.multiple(scripts, format_mean=format_cell, print_table=keep):
        scripts.print_results_tables(query.Q(records), method, latex=False)
    yield from found


def with_error_of_one_trial(cell: str | None) -> str:
    """What upstream prints of one trial, where our cell is the mean alone: its error is not known."""
    return f"{cell} +/- 0.0"


def ranked(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with -inf for every NaN that a selection method may validate by: what ranking NaN last comes to."""
    return [
        {
            name: -math.inf if isinstance(value, float) and math.isnan(value) and validated(name, record) else value
            for name, value in record.items()
        }
        for record in records
    ]


def validated(name: str, record: dict[str, Any]) -> bool:
    return name.endswith("_out_acc") or (name.endswith("_in_acc") and len(record["args"]["test_envs"]) > 1)


def compare_sweep(report: Report, what: str, records: list[dict[str, Any]]) -> None:
    compare_choices(report, what, records, records)
    if any(isinstance(value, float) and math.isnan(value) for record in records for value in record.values()):
        # Some of the above differs on purpose. Where upstream cannot see a NaN, nothing may.
        compare_choices(report, f"{what} without NaN", ranked(records), records)


def compare_choices(
    report: Report, sweep_name: str, their_records: list[dict[str, Any]], our_records: list[dict[str, Any]]
) -> None:
    selection, query = domainbed("model_selection"), domainbed("lib.query")
    results = Results(our_records, list(SELECTION_METHODS.values()))
    their_groups = group_records(their_records)
    for name, method in SELECTION_METHODS.items():
        theirs_method = getattr(selection, UPSTREAM_METHODS[name])
        report.check("model selection", name, theirs_method.name, method.title)
        moved = set()  # cells that upstream fills by a NaN which won
        for group, members in group_records(our_records).items():
            what, won = f"{sweep_name} {name} {group}", False
            for seed in {record["args"]["hparams_seed"] for record in members}:
                run, their_run = (
                    [record for record in each if record["args"]["hparams_seed"] == seed]
                    for each in (members, their_groups[group])
                )
                theirs = theirs_method.run_acc(query.Q(their_run))
                ours = method.select(run, group.test_env)
                nan = bool(theirs and ours and math.isnan(theirs["val_acc"]) and not math.isnan(ours.val_acc))
                won |= nan
                pairs = theirs and (theirs["val_acc"], theirs["test_acc"]), ours and (ours.val_acc, ours.test_acc)
                theirs, mine = (pair and (-math.inf if math.isnan(pair[0]) else pair[0], pair[1]) for pair in pairs)
                report.check("model selection", f"{what} hparams_seed {seed}", theirs, mine, "nan" if nan else None)
            ours = method.select(members, group.test_env)
            theirs_acc = theirs_method.sweep_acc(query.Q(their_groups[group]))
            report.check("model selection", what, theirs_acc, ours and ours.test_acc, "nan" if won else None)
            if won:
                moved |= {(group.algorithm, group.dataset, group.test_env), (group.algorithm, group.dataset)}
        for title, columns, rows in upstream_tables(their_records, theirs_method):
            compare_table(report, f"{sweep_name} {title}", columns, rows, results, method, moved)


def compare_table(
    report: Report, what: str, columns: list[str], rows: list[list[Any]], results: Results, method: Any, moved: set[Any]
) -> None:
    """One table of upstream's, whole; `moved` has (algorithm, data set) and (algorithm, data set, environment)."""
    match = re.match(r".*Dataset: (\w+)", what)
    dataset = match and match[1]
    figures = results.leave_one_out
    compared = [figures.comparison(method, name) for name in ([dataset] if dataset else figures.environments)]
    table = domain_table(compared[0]) if dataset else averages_table(compared)
    # Upstream sorts data sets by its own list, and so may we: columns are compared by name.
    report.check("tables", f"{what} header", sorted(columns), sorted(table.columns))
    report.check("tables", f"{what} rows", sorted(row[0] for row in rows), sorted(map(algorithm_of, table.rows)))
    texts = {algorithm_of(row): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    for algorithm, *cells in rows:
        for number, (column, cell) in enumerate(zip(columns[1:], cells, strict=True)):
            place, average = f"{what} {algorithm} {column}", column == "Avg"
            keys = [(algorithm, dataset, number)] if dataset else [(algorithm, column)]
            touched = any(key[0] == algorithm for key in moved) if average else any(key in moved for key in keys)
            unless = "nan" if touched else None
            text = texts[algorithm].get(column)
            if str(cell) == with_error_of_one_trial(text):
                text = str(cell)
            is_named = str(cell).startswith("nan") and text == DIVERGED
            report.check("tables", f"{place} text", str(cell), text, unless or ("diverged" if is_named else None))
            if not average:
                of = figures.comparison(method, dataset or column)
                found = of.summary(algorithm, "out_of_domain", number if dataset else None)
                report.check("tables", place, cell.numbers, found[:2] if found else (None, None), unless)


def algorithm_of(row: list[str]) -> str:
    """The algorithm of a row, whose label is beside it."""
    return row[0].partition(" (")[0]


def golden() -> dict[str, Any]:
    """What upstream makes of some fixed input, for the tests to hold against ours where there is no checkout."""
    tables_of: dict[str, Any] = {}
    for seed, name in itertools.product(GOLDEN_SEEDS, UPSTREAM_METHODS):
        records = generate(np.random.RandomState(seed))
        for title, columns, rows in upstream_tables(
            records, getattr(domainbed("model_selection"), UPSTREAM_METHODS[name])
        ):
            tables_of.setdefault(str(seed), {}).setdefault(name, []).append([title, columns, *sorted(rows)])
    folders = {
        dataset: {
            line: [Path(job.output_dir).name for job in upstream_jobs(parse_sweep(line, dataset))] for line in SWEEPS
        }
        for dataset in ("PACS",)
    }
    return {"tables": tables_of, "folders": folders}


def compare(checkout: str | Path | None, sweeps: int, seed: int) -> Report:
    """Compares everything.

    Args:
        checkout: upstream's folder; None where `domainbed_ext.upstream` finds one itself.
        sweeps: how many to generate.
        seed: of the generated sweeps.
    """
    upstream.register(checkout)
    report, rng = Report(), np.random.RandomState(seed)
    compare_seeds(report, rng)
    compare_splits(report)
    compare_hparams(report)
    compare_arguments(report)  # before its scripts are imported as modules
    compare_jobs(report)
    compare_datasets(report)
    with tempfile.TemporaryDirectory() as folder:
        make_pacs(Path(folder))
        compare_images(report, Path(folder))
        compare_records(report, Path(folder), Path(folder))
    for number in range(sweeps):
        compare_sweep(report, f"sweep {number}", generate(rng))
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", help="folder of facebookresearch/DomainBed")
    parser.add_argument("--sweeps", type=int, default=200, metavar="N", help="to generate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the generated sweeps (%(default)s)")
    parser.add_argument("--write_golden", action="store_true", help="write golden.json, beside this file, anew")
    args = parser.parse_args()
    if args.write_golden:
        upstream.register(args.checkout)
        GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
        return 0
    report = compare(args.checkout, args.sweeps, args.seed)
    report.show()
    return 1 if report.differences else 0


if __name__ == "__main__":
    exit_cleanly(main)
