"""Images per second on a GPU, and the share of its matmul rate, for ViT-Ti, ViT-S and ViT-B at 224 px.

Given a data set also the time of a whole run, and how much of it the GPU waits for images.
"""

import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from domainbed_ext.algorithms.names import get_algorithm_class
from domainbed_ext.bench import report, subprocesses, timing
from domainbed_ext.bench.report import device
from domainbed_ext.hparams_registry import resolve
from domainbed_ext.models.determinism import compute_reproducibly
from domainbed_ext.models.device import find_device
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.profile import operations, product_rate, wait

BACKBONES = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
METHODS = ("BOnly", "BA", "LP", "FullFT")


def measure(args: Namespace, output_dir: Path) -> None:
    """Times training steps and evaluation batches with random weights and images.

    Without a GPU it only prints a line, unless `--on_cpu` is given.

    Args:
        args: Arguments of `python -m domainbed_ext.bench`.
        output_dir: Folder for the tables.
    """
    if not torch.cuda.is_available():
        if not args.on_cpu:
            print("no CUDA device here: nothing is measured")
            return
        report.print_need("images per second")
    compute_reproducibly(find_device(None))  # as runs do
    where = "one GPU" if device() == "cuda" else "the CPU"
    title = f"Training steps and evaluation on {where}, in the precision of runs, random weights"
    rows: list[dict[str, Any]] = []
    for backbone, method in product(args.backbones, args.methods):
        rows += rates(backbone, method, args)
        report.write("gpu", title, rows, output_dir, show=False)
    report.write("gpu", title, rows, output_dir)
    if args.data_dir:
        whole_run(args, output_dir)


def rates(backbone: str, method: str, args: Namespace) -> list[dict[str, Any]]:
    """The rows of a backbone and a method, on whatever device there is.

    Args:
        backbone: Name of a timm model.
        method: Name of an algorithm.
        args: Arguments of `python -m domainbed_ext.bench`, of which it reads `batch_sizes`, `images`, `image_size` and
            `rounds`.
    """
    hparams = {**resolve(method, "PACS"), "backbone": backbone, "weights": "none"}
    size = args.image_size
    algorithm = get_algorithm_class(method)((3, size, size), 7, 1, {**hparams, "image_size": size})
    rate, rows = product_rate(algorithm), []

    def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(count, 3, size, size, device=algorithm.device)
        return x, torch.arange(count, device=x.device) % 7

    counted = operations(algorithm, [batch(2)])
    for stage, count in [*(("training", count) for count in args.batch_sizes), ("evaluation", args.images)]:
        x, y = batch(count)
        function = partial(_train, algorithm, x, y) if stage == "training" else partial(_look, algorithm, x)
        seconds = timing.interleaved({stage: function}, args.rounds)[stage]
        bound = counted["evaluate"] if stage == "evaluation" else counted["forward"] + counted["backward"]
        rows.append(
            {
                "backbone": backbone,
                "method": method,
                "stage": f"{stage}, batch {count}",
                "images/s": round(count / median(seconds), 1),
                "fastest": round(count / min(seconds), 1),
                "TFLOP/s": round(bound * count / median(seconds) / 1e12, 2),
                "of a large matmul's rate": round(bound * count / median(seconds) / rate, 2),
            }
        )
    return rows


def whole_run(args: Namespace, output_dir: Path) -> None:
    """Times a run of random weights that trains on one environment alone, on whatever device there is.

    Its images are put into the cache before. It is profiled, which costs it some of its overlap.

    Args:
        args: Arguments of `python -m domainbed_ext.bench`.
        output_dir: Folder for the table.

    Raises:
        BenchmarkError: If the run failed.
    """
    words = [sys.executable, "-m", "domainbed_ext.train", *subprocesses.arguments(args)]
    words += ["--protocol", "single_source", "--source_envs", "0", "--profile", "--skip_model_save"]
    words += ["--save_minutes", "0", "--output_dir"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "run")
        subprocesses.run("that fills the cache", [*words, str(Path(folder, "first")), "--steps", "1"])
        start = time.perf_counter()
        subprocesses.run("that is timed", [*words, str(place)])
        seconds = time.perf_counter() - start
        record = RunFolder(place).records()[-1]
    stages = record["profile"]["stages"]
    inside = sum(stage["seconds"] for stage in stages.values())
    row = {
        "steps": args.steps,
        "seconds, start to end": round(seconds, 1),
        "of them in stages": round(inside, 1),
        **{f"{name}, %": round(100 * stage["seconds"] / inside, 1) for name, stage in stages.items()},
        "of the lower bound": round(sum(stage["floor"] for stage in stages.values()) / inside, 2),
        "peak GB": round(record["mem_gb"], 1),
    }
    title = f"A run on one environment of {args.dataset}, {args.algorithm}, {args.backbone}, {args.steps} steps"
    report.write(f"run_{device()}", title, [row], output_dir, (f"Hyperparameters {args.hparams}; profiled.",))


def _train(algorithm: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    algorithm.update([(x, y)])
    wait(algorithm.device)


def _look(algorithm: Any, x: torch.Tensor) -> None:
    algorithm.eval()
    with torch.inference_mode():
        algorithm.predict(x).argmax(1)
    wait(algorithm.device)
