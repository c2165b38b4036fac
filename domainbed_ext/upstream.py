"""The bridge to a checkout of facebookresearch/DomainBed: runs its scripts with our algorithms registered.

python -m domainbed_ext.upstream --checkout DomainBed train --algorithm BOnly --dataset PACS --data_dir D ...

The checkout is not changed. Where upstream has no hook, its modules are patched once they are imported: `register`
lists every patch.
"""

import argparse
import importlib
import importlib.util
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_ext import hparams_registry
from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.algorithms.hyperparameters import is_changed
from domainbed_ext.algorithms.names import parse_name
from domainbed_ext.algorithms.registry import METHODS
from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.models import backbones
from domainbed_ext.models.inputs import IMAGENET_MEAN, IMAGENET_STD, Inputs
from domainbed_ext.system import option_values
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command

SCRIPTS = ("train", "sweep", "collect_results", "list_top_hparams")
VARIABLE = "DOMAINBED_CHECKOUT"
CLONE = "git clone https://github.com/facebookresearch/DomainBed"

DESCRIPTION = f"""\
Runs a script of a DomainBed checkout with the script's own arguments. Its algorithms are DomainBed's and this
package's, such as BA (LoRA), BOnly (LoRA-FA), LP and FullFT. A name may have an objective and fix hyperparameters, as
in BOnly+CORAL@rank=16. --hparams accepts the hyperparameters of these methods too (rank, backbone, weights, ...).

The checkout is --checkout, else the environment variable {VARIABLE}, else the importable package
`domainbed`."""

EXAMPLES = """\
examples:
  git clone https://github.com/facebookresearch/DomainBed
  export DOMAINBED_CHECKOUT=$PWD/DomainBed

  python -m domainbed_ext.upstream train --dataset PACS --data_dir data --algorithm BOnly@rank=16 \\
      --hparams '{"backbone": "vit_tiny_patch16_224"}' --test_envs 3 --output_dir runs/sketch
  python -m domainbed_ext.upstream sweep launch --datasets PACS --algorithms ERM BA BOnly --data_dir data \\
      --output_dir runs/upstream --command_launcher local --single_test_envs --skip_confirmation
  python -m domainbed_ext.upstream collect_results --input_dir runs/upstream
  python -m domainbed_ext.upstream train --help        # the arguments of that script

differences from `python -m domainbed.scripts.SCRIPT`:
  the runs of a sweep are started by this command, so that they know these methods too
  `wilds` is needed only for its own data sets
  a batch larger than a split is an error; upstream's loader waits forever
  hyperparameters are plain Python numbers, so that model.pkl loads with torch's weights_only
  these methods get images of their backbone's input size and input statistics; with --hparams
    '{"input_stats": "imagenet"}' images keep the statistics that upstream normalised them with
"""


def find_checkout(given: Path | str | None = None) -> Path:
    """The folder of the checkout.

    Args:
        given: Folder; None for the environment variable's, or that of an importable `domainbed`.

    Returns:
        The folder that holds `domainbed/`.

    Raises:
        BenchmarkError: If there is no checkout, or the folder is something else.
    """
    given = given or os.environ.get(VARIABLE)
    if given:
        root = Path(given).expanduser().resolve()
    else:
        spec = importlib.util.find_spec("domainbed")
        places = list(spec.submodule_search_locations or ()) if spec else []
        if not places:
            raise BenchmarkError(f"no DomainBed checkout: `{CLONE}`, then give it by --checkout DIR or {VARIABLE}")
        root = Path(places[0]).resolve().parent
    for file in ("domainbed/algorithms.py", "domainbed/hparams_registry.py", "domainbed/scripts/train.py"):
        if not (root / file).is_file():
            raise BenchmarkError(
                f"{root} is not a DomainBed checkout (no {file} in it): give --checkout the folder that `{CLONE}` makes"
            )
    return root


def register(checkout: Path | str | None = None) -> Path:
    """Imports upstream and puts our algorithms into its registries; twice does no more than once.

    Args:
        checkout: Folder of the checkout; see `find_checkout`.

    Returns:
        The checkout's folder.

    Raises:
        BenchmarkError: If there is no checkout, another one is already imported, or a package that DomainBed needs is
            missing.
    """
    root = find_checkout(checkout)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    _replace_wilds()
    algorithms = _import("domainbed.algorithms")
    if not Path(algorithms.__file__ or "").resolve().is_relative_to(root):
        raise BenchmarkError(f"domainbed is already imported, from {algorithms.__file__}: use one checkout per process")
    for name, method in METHODS.importable():
        if name not in vars(algorithms):  # ERM is upstream's own
            ours = method.load()
            setattr(algorithms, name, type(name, (Bridged, ours), {"__doc__": ours.__doc__}))
            algorithms.ALGORITHMS.append(name)
    _replace(algorithms, "get_algorithm_class", _get_algorithm_class)
    _replace(_import("domainbed.hparams_registry"), "_hparams", _hparams)
    _replace(_import("domainbed.lib.fast_data_loader"), "InfiniteDataLoader", _infinite_data_loader)
    return root


def _import(name: str) -> Any:
    """A module of upstream's."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"DomainBed needs the package {error.name}: pip install {error.name}") from error


def _replace(module: ModuleType, name: str, make: Callable[[Any], Any]) -> None:
    """Puts `make(what is there)` in a module's place `name`, once."""
    if not hasattr(original := getattr(module, name), "bridges"):
        replacement = make(original)
        replacement.bridges = original
        setattr(module, name, replacement)


def _replace_wilds() -> None:
    """Lets `domainbed.datasets`, which imports two classes of wilds, be imported without that package."""
    missing = {"wilds.datasets.camelyon17_dataset": "Camelyon17Dataset", "wilds.datasets.fmow_dataset": "FMoWDataset"}
    try:
        for module in missing:
            importlib.import_module(module)
    except ImportError:  # not there, or made for another torch
        for name in ("wilds", "wilds.datasets", *missing):
            sys.modules[name] = importlib.util.module_from_spec(ModuleSpec(name, None))
        for name, dataset in missing.items():
            setattr(sys.modules[name], dataset, _no_wilds)


def _no_wilds(*args: Any, **kwargs: Any) -> None:
    raise BenchmarkError("this data set needs the package wilds: pip install wilds")


class _Fit:
    """Converts images from what upstream passes to what the backbone expects.

    Upstream normalises what it resizes to 224 px with ImageNet's statistics; its 28 px images are in [0, 1], with
    one channel or two (red and green).

    Args:
        given: (channels, height, width) of upstream's data set.
        wanted: Input size and input statistics of the backbone.
        stats: "backbone", or "imagenet" to keep the values as they are; see `backbones.INPUT_STATS`.
    """

    def __init__(self, given: Sequence[int], wanted: Inputs, stats: str) -> None:
        self.size = wanted.size
        photographs = tuple(given[1:]) == (224, 224)
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if photographs else ((0.0,) * 3, (1.0,) * 3)
        keep = stats == "imagenet" or (mean, std) == (wanted.mean, wanted.std)
        old_mean, old_std, new_mean, new_std = (
            torch.tensor(values).view(-1, 1, 1) for values in (mean, std, wanted.mean, wanted.std)
        )
        self.affine = None if keep else (old_std / new_std, (old_mean - new_mean) / new_std)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A forward pre-hook: [batch, channels, height, width] → [batch, 3, *size]."""
        x, *rest = inputs
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        elif x.shape[1] == 2:
            x = F.pad(x, (0, 0, 0, 0, 0, 1))
        if tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        if self.affine is not None:
            scale, shift = (each.to(x.device) for each in self.affine)
            x = x * scale + shift
        return x, *rest


_NEED_OUR_LOOP = ("schedule", "warmup", "accumulate", "average")


class Bridged(Algorithm):
    """One of our algorithms under upstream's scripts: images of any shape are converted for its backbone."""

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, num_domains: int, hparams: dict[str, Any]
    ) -> None:
        hparams_registry.check(hparams)  # upstream does not check --hparams
        ours = [name for name in _NEED_OUR_LOOP if is_changed(name, hparams)]
        ours += ["head_start=probe"] if hparams.get("head_start") == "probe" else []
        if ours:
            raise BenchmarkError(
                f"upstream's training loop has no {' and no '.join(ours)}: leave that out, or train by python -m "
                "domainbed_ext.train"
            )
        stats = hparams.get("input_stats", "backbone")
        if stats not in backbones.INPUT_STATS:
            raise unknown("input_stats", str(stats), backbones.INPUT_STATS)
        inputs = backbones.inputs(hparams["backbone"], hparams["image_size"])
        super().__init__(inputs.shape, num_classes, num_domains, hparams)
        self.backbone.register_forward_pre_hook(_Fit(input_shape, inputs, stats))


def _registered(name: str) -> type[Bridged] | None:
    """Our algorithm of a name, with or without objective and fixed hyperparameters; None for one of upstream's."""
    algorithm = vars(sys.modules["domainbed.algorithms"]).get(re.split("[+@]", name)[0])
    return algorithm if isinstance(algorithm, type) and issubclass(algorithm, Bridged) else None


def _get_algorithm_class(upstreams: Callable[[str], Any]) -> Callable[[str], Any]:
    def of(name: str) -> Any:
        if ours := _registered(name):
            parse_name(name)  # its objective and hyperparameters are checked too
            return ours
        try:
            return upstreams(name)
        except NotImplementedError:
            names = sys.modules["domainbed.algorithms"].ALGORITHMS
            if (base := name.partition("+")[0]) != name and base in names:
                raise BenchmarkError(
                    f"{name!r}: {base} is upstream's own here, which takes no objective: give one of "
                    f"{', '.join(METHODS)} in its place"
                ) from None
            raise unknown("algorithm", name, names, METHODS.synonyms()) from None

    return of


def _hparams(upstreams: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Name to (default, random value), for our algorithms and upstream's."""

    def of(algorithm: str, dataset: str, random_seed: int) -> dict[str, Any]:
        if _registered(algorithm) is None:
            found = upstreams(algorithm, dataset, random_seed)
            return {name: tuple(map(hparams_registry.plain, pair)) for name, pair in found.items()}
        base, fixed = parse_name(algorithm)
        default = hparams_registry.default_hparams(base, dataset)
        drawn = hparams_registry.random_hparams(base, dataset, random_seed)
        for hparams in (default, drawn):
            hparams.setdefault("input_stats", "backbone")
            hparams_registry.apply(hparams, fixed, f"the name {algorithm!r}")
        return {name: (default[name], drawn[name]) for name in default}

    return of


def _infinite_data_loader(upstreams: Any) -> type:
    """Upstream's training loader, with an error where it would wait for a batch that never fills."""

    class InfiniteDataLoader(upstreams):
        def __init__(self, dataset: Any, weights: Any, batch_size: int, num_workers: int) -> None:
            if weights is None and batch_size > len(dataset):
                raise BenchmarkError(
                    f"batch_size {batch_size} is larger than the {len(dataset)} images of a split: "
                    f"lower it, e.g. --hparams '{{\"batch_size\": {max(1, len(dataset) // 2)}}}'"
                )
            super().__init__(dataset, weights, batch_size, num_workers)

    return InfiniteDataLoader


def set_workers(count: int) -> None:
    """Sets the number of processes of each of upstream's loaders, for every data set.

    Args:
        count: Number of processes; 0 loads in the process of the run.
    """
    for each in vars(_import("domainbed.datasets")).values():
        if isinstance(each, type) and "N_WORKERS" in vars(each):
            setattr(each, "N_WORKERS", count)  # noqa: B010  (not an attribute of every type)


@contextmanager
def rerouted(train: Sequence[str]) -> Iterator[None]:
    """Makes upstream's launchers start runs by another command than `python -m domainbed.scripts.train`.

    Args:
        train: Words of the other command.
    """
    launchers = _import("domainbed.command_launchers")
    registry, old, new = launchers.REGISTRY, "python -m domainbed.scripts.train ", f"{shlex.join(train)} "

    def reroute(launcher: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
        return lambda commands: launcher([command.replace(old, new, 1) for command in commands])

    launchers.REGISTRY = {name: reroute(launcher) for name, launcher in registry.items()}
    try:
        yield
    finally:
        launchers.REGISTRY = registry


def run(script: str, arguments: Sequence[str]) -> None:
    """Runs one of upstream's scripts in this process; `register` comes first.

    Args:
        script: One of `SCRIPTS`.
        arguments: Arguments of the script.

    Raises:
        BenchmarkError: If the input has a mistake; it is in the run's err.txt too.
    """
    # The scripts replace the standard streams by a Tee, and leave it there.
    kept = sys.argv, sys.stdout, sys.stderr
    sys.argv = [script, *arguments]
    try:
        runpy.run_module(f"domainbed.scripts.{script}", run_name="__main__", alter_sys=True)
    except BenchmarkError as error:
        if (log := getattr(sys.stderr, "file", None)) is not None:  # a Tee, which itself prints on standard output
            print(f"error: {error}", file=log, flush=True)
        raise
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"DomainBed needs the package {error.name}: pip install {error.name}") from error
    finally:
        sys.argv, sys.stdout, sys.stderr = kept


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(
        prog="python -m domainbed_ext.upstream",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkout", type=option_values.path, metavar="DIR", help="folder of the DomainBed checkout")
    parser.add_argument(
        "--workers",
        type=option_values.whole(0),
        metavar="N",
        help="processes of each loader (default: upstream's 8); 0: none",
    )
    parser.add_argument("script", help=", ".join(SCRIPTS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    return parser


def _expanded(arguments: Sequence[str]) -> list[str]:
    """The script's arguments, with `~` and variables expanded in those that are paths."""
    before = ["", *arguments]
    return [
        option_values.expand(option, word, option_values.path)
        if option in ("--data_dir", "--output_dir", "--input_dir")
        else word
        for option, word in zip(before, arguments, strict=False)
    ]


@as_command(START_AGAIN)
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.upstream`."""
    args = make_parser().parse_args(argv)
    if args.script not in SCRIPTS:
        raise unknown("script", args.script, SCRIPTS)
    root = register(args.checkout)
    again = [sys.executable, "-m", "domainbed_ext.upstream", "--checkout", str(root)]
    if args.workers is not None:
        set_workers(args.workers)
        again += ["--workers", str(args.workers)]
    with rerouted([*again, "train"]):
        run(args.script, _expanded(args.arguments))
    return 0


if __name__ == "__main__":
    main()
