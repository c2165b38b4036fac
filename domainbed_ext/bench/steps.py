"""Training steps and evaluation as a run computes them, compared with PEFT and timm's own model; random weights.

Peers compute in bf16 under torch's autocast and in float32. Targets are about the faster of the two: a processor
without bf16 matmuls emulates them.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.algorithms.names import get_algorithm_class
from domainbed_ext.bench import report, timing
from domainbed_ext.bench.lower_bound import measure_rates
from domainbed_ext.bench.targets import Targets, choose_targets, describe_targets, judge
from domainbed_ext.hparams_registry import resolve
from domainbed_ext.models.precision import autocast
from domainbed_ext.runs.profile import wait
from vitlorafa import AdapterConfig, fastest_evaluation_batch, keep_freed_memory
from vitlorafa.bench.case import CLASSES, Case
from vitlorafa.bench.measure import make_batch, train_step
from vitlorafa.bench.methods import Setup, build, why_unavailable

DROPOUT = 0.1
EVALUATED = 128  # images: whole batches of any size that a run evaluates in
PEERS = ("bf16", "float32")
"""Precisions that PEFT's and timm's models can be timed in."""


@dataclass(frozen=True)
class Comparison:
    """A row of the table: one function's time over another's.

    Attributes:
        stage: What both do.
        ours: Name of a function.
        other: Name of the function that it is compared with.
        target: Names of the attribute in `Targets` and of the bound of `judge`; None for no target.
    """

    stage: str
    ours: str
    other: str
    target: tuple[str, str] | None = None


def measure(args: Namespace, output_dir: Path) -> None:
    """Times steps and evaluation for each backbone, prints a table and writes it.

    Args:
        args: Arguments of `python -m domainbed_ext.bench`.
        output_dir: Folder for the table.
    """
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for number, backbone in enumerate(args.backbones, 1):
        models = _Models(backbone, args)
        if not notes:
            rates = measure_rates(models.ours("BOnly"))
            targets = choose_targets(rates, report.device())
            notes = [*_notes(args), describe_targets(targets, rates), *models.skipped]
        for functions, comparisons in (models.training(), models.evaluation()):
            seconds = timing.interleaved(functions, args.rounds)
            rows += [_row(backbone, each, seconds, targets) for each in _mark_targets(comparisons, seconds)]
        title = f"Steps and evaluation at {args.image_size} px, {args.threads} thread(s)"
        report.write("steps", title, rows, output_dir, notes, show=number == len(args.backbones))


class _Models:
    """The models of a backbone, and functions of them.

    Args:
        backbone: Name of a timm model.
        args: Arguments of `python -m domainbed_ext.bench`.

    Attributes:
        skipped: A sentence for each peer that cannot run.
    """

    def __init__(self, backbone: str, args: Namespace) -> None:
        self.backbone, self.args = backbone, args
        device = report.device()
        targets = AdapterConfig(targets=args.targets).targets
        self.case = Case(backbone, args.batch_size, args.image_size, "bf16", args.rank, targets, device=device)
        reason = why_unavailable("peft_lora_fa", self.case)
        self.has_peft = reason is None
        self.skipped = [] if reason is None else [f"PEFT LoRA-FA is left out: {reason}."]

    def ours(self, method: str, dropout: float = 0.0) -> Algorithm:
        """The algorithm of a run.

        Args:
            method: Name of the algorithm.
            dropout: Probability of adapter dropout.
        """
        args, chosen = self.args, {"backbone": self.backbone, "weights": "none", "image_size": self.args.image_size}
        adapter = {"rank": args.rank, "targets": args.targets, "adapter_dropout": dropout}
        hparams = {**resolve(method, "PACS"), **chosen, **adapter}
        return get_algorithm_class(method)((3, args.image_size, args.image_size), CLASSES, 3, hparams)

    def training(self) -> tuple[dict[str, Callable[[], object]], list[Comparison]]:
        """Functions of a training step each, and what is compared."""
        batch = make_batch(self.case)
        ours = {
            "BOnly": self.ours("BOnly"),
            "BOnly, dropout": self.ours("BOnly", DROPOUT),
            "FullFT": self.ours("FullFT"),
        }
        functions: dict[str, Callable[[], object]] = {
            _named(name, each): partial(_update, each, *batch) for name, each in ours.items()
        }
        bonly, dropout, full = functions
        comparisons = [Comparison("step, dropout 0.1 over none", dropout, bonly, ("dropout", "most"))]
        peers = {"timm, full fine-tuning": build("full", self.case)}
        if self.has_peft:
            peers["PEFT LoRA-FA"] = build("peft_lora_fa", self.case)
            peers["PEFT LoRA-FA, dropout"] = build("peft_lora_fa", replace(self.case, dropout=DROPOUT))
        for precision in self.args.peers:
            for name, setup in peers.items():
                functions[f"{name}, {precision}"] = partial(self._step, setup, precision, *batch)
            comparisons.append(Comparison("step, FullFT", full, f"timm, full fine-tuning, {precision}"))
            if self.has_peft:
                plain, dropped = (f"{name}, {precision}" for name in list(peers)[1:])
                comparisons.append(Comparison("step, BOnly", bonly, plain, ("step", "most")))
                comparisons.append(Comparison("step, BOnly, dropout 0.1", dropout, dropped))
                comparisons.append(Comparison("step, dropout 0.1 over none", dropped, plain))
        return functions, sorted(comparisons, key=lambda each: each.stage)

    def evaluation(self) -> tuple[dict[str, Callable[[], object]], list[Comparison]]:
        """Functions that evaluate the same images each, in the batches of a run, and what is compared."""
        images, _ = make_batch(self.case, EVALUATED)
        timm = build("full", self.case).model.eval()
        functions: dict[str, Callable[[], object]] = {}
        comparisons = []
        for method in ("BOnly", "FullFT"):
            algorithm = self.ours(method).eval()
            batches = _split(algorithm.backbone, algorithm.precision, images)
            functions[_named(method, algorithm)] = partial(_evaluate, algorithm.predict, batches)
        for precision in self.args.peers:
            name = f"timm, {precision}"
            batches = _split(timm, precision, images)
            functions[name] = partial(_evaluate, partial(_forward, timm, precision), batches)
            comparisons += [
                Comparison(f"evaluation, {ours.partition(',')[0]}", ours, name, ("evaluation", "least"))
                for ours in list(functions)[:2]
            ]
        return functions, sorted(comparisons, key=lambda each: each.stage)

    def _step(self, setup: Setup, precision: str, images: Tensor, labels: Tensor) -> None:
        train_step(setup, replace(self.case, precision=precision), images, labels, lambda: None)
        wait(images.device)


def _named(name: str, algorithm: Algorithm) -> str:
    return f"{name}, {algorithm.precision}"


def _update(algorithm: Algorithm, images: Tensor, labels: Tensor) -> None:
    algorithm.update([(images, labels)])
    wait(images.device)


def _split(model: nn.Module, precision: str, images: Tensor) -> Sequence[Tensor]:
    with autocast(precision, images.device):
        return images.split(fastest_evaluation_batch(model))


def _forward(model: nn.Module, precision: str, images: Tensor) -> Tensor:
    with autocast(precision, images.device):
        return model(images)


def _evaluate(predict: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> None:
    with torch.inference_mode():
        for images in batches:
            predict(images).argmax(1).cpu()


def _mark_targets(comparisons: Sequence[Comparison], seconds: Mapping[str, list[float]]) -> Iterator[Comparison]:
    """Takes the target off a comparison with the slower precision of a peer."""
    for each in comparisons:
        same = [other.other for other in comparisons if (other.stage, other.ours) == (each.stage, each.ours)]
        is_fastest = each.other == min(same, key=lambda name: median(seconds[name]))
        yield each if is_fastest else replace(each, target=None)


def _row(
    backbone: str, comparison: Comparison, seconds: Mapping[str, list[float]], targets: Targets | None
) -> dict[str, object]:
    ratio = timing.ratio(seconds, comparison.ours, comparison.other)
    is_rate = comparison.stage.startswith("evaluation")
    if is_rate:
        ratio = 1 / ratio
    name, bound = comparison.target or ("", "")
    limit = {bound: getattr(targets, name)} if name and targets else {}
    return {
        "backbone": backbone,
        "stage": comparison.stage,
        "way": comparison.ours,
        "ms": round(1000 * median(seconds[comparison.ours]), 2),
        "against": comparison.other,
        "its ms": round(1000 * median(seconds[comparison.other]), 2),
        "images/s": round(EVALUATED / median(seconds[comparison.ours]), 1) if is_rate else None,
        "ratio": round(ratio, 3),
        **judge(ratio, **limit),
    }


def _notes(args: Namespace) -> list[str]:
    return [
        f"Steps of {args.batch_size} images, rank {args.rank}, targets {args.targets}, adapter dropout {DROPOUT} where "
        f"it is named; evaluation of {EVALUATED} images in the batches of a run. {args.rounds} interleaved round(s), "
        "medians.",
        "ratio: of a step, its time over the other's; of evaluation, its images per second over the other's; the "
        "median of the rounds' ratios. Peers in bf16 run under torch's autocast. A target is about the faster "
        "precision of the peer.",
    ]
