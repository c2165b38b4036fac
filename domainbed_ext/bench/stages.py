"""Images per second of each stage of a run, from the file to the optimizer, on one core or one GPU.

The plain implementation is DomainBed's: PIL decodes the JPEG each time, torchvision transforms it, and the model
computes in float32. Peers of our images are torchvision's decoder and its transforms on tensors of 8 bits, and other
decoders that are installed. The lower bound of a stage is the time of its matmuls (`domainbed_ext.runs.profile`).
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from domainbed_ext.bench import plain, report, timing
from domainbed_ext.bench.decoders import Decoder, decode_by_torchvision, find_decoders
from domainbed_ext.bench.subprocesses import arguments
from domainbed_ext.data.augmentation import AUGMENTATIONS, Augmentation
from domainbed_ext.datasets.folders import FolderEnvironment
from domainbed_ext.runs.arguments import parse
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.profile import operations, product_rate
from domainbed_ext.runs.setup import Setup, set_up, set_up_process

METHODS = ("BOnly", "BA", "LP", "FullFT")


def measure(args: Namespace, output_dir: Path) -> None:
    """Times the stages on a data set of image folders, prints a table and writes it.

    Args:
        args: Arguments of `python -m domainbed_ext.bench`.
        output_dir: Folder for the table.
    """
    setup = setup_of(args, "BOnly")
    set_up_process(setup.args)
    decoders, missing = find_decoders()
    rows = [*_images(setup, args, decoders), *_models(args)]
    notes = (
        "× plain: rate relative to the plain implementation of the same stage, the median of the rounds' ratios.",
        "of the lower bound: share of the rate that the stage would have if only its matmuls took time.",
        _describe_decoders(setup, args, decoders, missing),
    )
    title = f"Stages of a run on {args.dataset}, {setup.hparams['backbone']}, {setup.args.threads} thread(s)"
    report.write("stages", title, rows, output_dir, notes)


def setup_of(args: Namespace, algorithm: str, precision: str | None = None) -> Setup:
    """A run's parts.

    Args:
        args: Arguments of `python -m domainbed_ext.bench`.
        algorithm: Name of the algorithm.
        precision: Precision; None for the default.
    """
    more = ["--precision", precision] if precision else []
    return set_up(parse(arguments(args, "--algorithm", algorithm, *more)))


def _keys(environment: FolderEnvironment, args: Namespace) -> list[int]:
    return np.random.default_rng(0).permutation(len(environment))[: args.images].tolist()


def _images(setup: Setup, args: Namespace, decoders: dict[str, Decoder]) -> list[dict[str, Any]]:
    """From the file or the cache to a tensor."""
    feed, env = Feed(setup, setup.make_algorithm()), setup.train_envs[0]
    environment, inputs = plain.folder_of(setup, env), setup.inputs
    keys = _keys(environment, args)
    paths = [str(environment.paths[key]) for key in keys]
    kept, resized = feed.images.training[env], feed.images.evaluation[env]
    augment, look = AUGMENTATIONS["domainbed"], AUGMENTATIONS["none"]
    augmented, only_resized = plain.transforms(inputs, True), plain.transforms(inputs, False)
    pixels = [np.array(kept[key]) for key in keys]
    pictures = [Image.fromarray(each) for each in pixels]
    tensors = [torch.from_numpy(each).permute(2, 0, 1).contiguous() for each in pixels]

    size = int(setup.hparams["batch_size"])
    batches = [keys[start : start + size] for start in range(0, len(keys), size)]

    def made(images: Any, change: Augmentation, ready: Callable[[Tensor], Tensor] = lambda batch: batch) -> None:
        for batch in batches:
            ready(change([images[key] for key in batch], inputs.size, np.random.default_rng(0)))

    groups: dict[str, dict[str, Callable[[], object]]] = {
        "training images": {
            "plain: decode, transform": lambda: [augmented(environment.load(key)) for key in keys],
            "decode (PIL)": lambda: [environment.load(key) for key in keys],
            **{
                f"decode ({name})": lambda decode=decode: [decode(path) for path in paths]  # type: ignore[misc]
                for name, decode in decoders.items()
            },
            "transform (PIL, torchvision)": lambda: [augmented(picture) for picture in pictures],
            "transform (tensors, torchvision)": lambda: [augmented(tensor) for tensor in tensors],
            "peer: decode (torchvision.io), transform (tensors)": lambda: [
                augmented(decode_by_torchvision(path)) for path in paths
            ],
            "read from the cache": lambda: [np.array(kept[key]) for key in keys],
            "augment": lambda: augment(pixels, inputs.size, np.random.default_rng(0)),
            "ours: read, augment": lambda: made(kept, augment),
            "ours: read, augment, normalise": lambda: made(kept, augment, inputs.ready),
        },
        "evaluation images": {
            "plain: decode, resize": lambda: [only_resized(environment.load(key)) for key in keys],
            "peer: decode (torchvision.io), resize (tensors)": lambda: [
                only_resized(decode_by_torchvision(path)) for path in paths
            ],
            "ours: read": lambda: made(resized, look),
            "ours: read, normalise": lambda: made(resized, look, inputs.ready),
        },
    }
    rows = []
    for group, functions in groups.items():
        seconds = timing.interleaved(functions, args.rounds)
        first = next(iter(functions))
        for name in functions:
            rows.append(row(group, name, seconds[name], len(keys), 1 / timing.ratio(seconds, name, first)))
    return rows


def _describe_decoders(setup: Setup, args: Namespace, decoders: dict[str, Decoder], missing: list[str]) -> str:
    """Says how many images other decoders decode to other pixels than PIL, and which are left out."""
    environment = plain.folder_of(setup, setup.train_envs[0])
    keys = _keys(environment, args)
    differ = dict.fromkeys(decoders, 0)
    for key in keys:
        pixels = torch.from_numpy(np.array(environment.load(key))).permute(2, 0, 1)
        for name, decode in decoders.items():
            differ[name] += not torch.equal(decode(str(environment.paths[key])), pixels)
    counted = ", ".join(f"{count} of {len(keys)} by {name}" for name, count in differ.items())
    left_out = f" Not installed and left out: {', '.join(missing)}." if missing else ""
    return f"PIL is version {PIL.__version__}. Images that others decode to other pixels: {counted}.{left_out}"


def _models(args: Namespace) -> list[dict[str, Any]]:
    """Training steps and evaluation batches, compared with the plain implementation in float32."""
    rows = []
    for method in METHODS:
        setups = {"plain: float32": setup_of(args, method, "float32"), "ours": setup_of(args, method)}
        algorithms = {name: setup.make_algorithm() for name, setup in setups.items()}
        size = setups["ours"].images_a_step
        x = torch.randn(size, *setups["ours"].inputs.shape, device=algorithms["ours"].device)
        y = torch.arange(size, device=x.device) % setups["ours"].dataset.num_classes
        ours = algorithms["ours"]
        counted, rate = operations(ours, [(x, y)]), product_rate(ours)
        bounds = {"training step": counted["forward"] + counted["backward"], "evaluation": counted["evaluate"]}

        def look(algorithm: Any, x: Tensor = x) -> None:
            algorithm.eval()
            with torch.inference_mode():
                algorithm.predict(x).argmax(1).cpu()

        for stage, work in (("training step", lambda a, x=x, y=y: a.update([(x, y)])), ("evaluation", look)):
            functions = {name: lambda a=each, work=work: work(a) for name, each in algorithms.items()}
            seconds = timing.interleaved(functions, args.rounds)
            for name in functions:
                share = bounds[stage] * size / rate / median(seconds[name]) if name == "ours" else None
                faster = 1 / timing.ratio(seconds, name, "plain: float32")
                rows.append(row(f"{stage}, {method}", name, seconds[name], size, faster, share))
    return rows


def row(
    group: str, name: str, seconds: list[float], images: int, faster: float, share: float | None = None
) -> dict[str, Any]:
    """A row of the table.

    Args:
        group: Name of the stage.
        name: Name of the implementation.
        seconds: Seconds of each call.
        images: Images per call.
        faster: Rate relative to the plain implementation.
        share: Share of the rate that the matmul lower bound allows; None where it is not known.
    """
    return {
        "stage": group,
        "way": name,
        "images/s": round(images / median(seconds), 1),
        "fastest": round(images / min(seconds), 1),
        "ms an image": round(1000 * median(seconds) / images, 3),
        "× plain": round(faster, 2),
        "of the lower bound": None if share is None else round(share, 2),
    }
