"""What a GPU does: images a second and the share of its products' rate, for ViT-Ti, ViT-S and ViT-B at 224 px."""

from argparse import Namespace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from domainbed_ext.algorithms import get_algorithm_class, get_hparams
from domainbed_ext.bench import report, timing
from domainbed_ext.profile import operations, product_rate, wait

BACKBONES = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
METHODS = ("BOnly", "BA", "LP", "FullFT")


def measure(args: Namespace, output_dir: Path) -> None:
    """Times training steps and evaluation batches of random weights and images; says so where there is no GPU.

    Args:
        args: of `python -m domainbed_ext.bench`.
        output_dir: of the table.
    """
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing measured")
        return
    rows = [row for backbone in BACKBONES for method in METHODS for row in rates(backbone, method, args)]
    report.write("gpu", "Training steps and evaluation on one GPU, bf16, random weights", rows, output_dir)


def rates(backbone: str, method: str, args: Namespace) -> list[dict[str, Any]]:
    """The rows of a backbone and a method, on whatever device there is.

    Args:
        backbone: name of a timm model.
        method: name of an algorithm.
        args: of `python -m domainbed_ext.bench`; its `batch_sizes` of training, `images` of evaluation and `rounds`.
    """
    hparams = {**get_hparams(method, "PACS"), "backbone": backbone, "weights": "none"}
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
        floor = counted["evaluate"] if stage == "evaluation" else counted["forward"] + counted["backward"]
        rows.append(
            {
                "backbone": backbone,
                "method": method,
                "stage": f"{stage}, batch {count}",
                "images/s": round(count / median(seconds), 1),
                "fastest": round(count / min(seconds), 1),
                "TFLOP/s": round(floor * count / median(seconds) / 1e12, 2),
                "of a large product's rate": round(floor * count / median(seconds) / rate, 2),
            }
        )
    return rows


def _train(algorithm: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    algorithm.update([(x, y)])
    wait(algorithm.device)


def _look(algorithm: Any, x: torch.Tensor) -> None:
    algorithm.eval()
    with torch.inference_mode():
        algorithm.predict(x).argmax(1)
    wait(algorithm.device)
