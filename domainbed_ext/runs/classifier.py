"""The trained model of a finished run, for any images: its data set need not be there."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from domainbed_ext.algorithms.base import TRAINED, Algorithm
from domainbed_ext.algorithms.derived_names import split_derived
from domainbed_ext.algorithms.names import canonical_name
from domainbed_ext.algorithms.registry import OBJECTIVE
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import backbones
from domainbed_ext.models.inputs import Inputs
from domainbed_ext.models.precision import autocast
from domainbed_ext.runs import ways
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.runs.imports import load
from domainbed_ext.runs.predictions import load_predictions
from domainbed_ext.runs.provenance import own_sources
from domainbed_ext.runs.saved import (
    BEST,
    Moved,
    Saved,
    check_known,
    check_same,
    find_saved,
    load_weights,
    read_records,
    recorded_arguments,
)
from domainbed_ext.runs.setup import make_algorithm, set_up_process
from vitlorafa import fastest_evaluation_batch


@dataclass(frozen=True)
class Classifier:
    """The trained model of a finished run.

    Attributes:
        record: Record of the step whose weights it has.
        algorithm: Algorithm with these weights.
        inputs: Size and statistics of the images that the run was trained and evaluated on.
        classes: Names of the classes.
    """

    record: dict[str, Any]
    algorithm: Algorithm
    inputs: Inputs
    classes: tuple[str, ...]

    @cached_property
    def batch_size(self) -> int:
        """Number of images that are classified fastest at a time."""
        with autocast(self.algorithm.precision, self.algorithm.device):
            return fastest_evaluation_batch(self.algorithm.backbone)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Classifies images, in the precision of the run.

        Args:
            images: Images at the backbone's input size, uint8 [n, 3, height, width].

        Returns:
            Logits [n, classes], float32, on the CPU.
        """
        algorithm = self.algorithm.eval()
        return algorithm.predict(self.inputs.ready(images.to(algorithm.device, non_blocking=True))).cpu()


def load_classifier(
    run: RunFolder,
    step: str = BEST,
    moved: Moved = Moved(),  # noqa: B008  (it is frozen)
    threads: int | None = None,
) -> Classifier:
    """Loads the model of a finished run, or of a soup.

    Args:
        run: Folder of the run.
        step: "best" for the step that training-domain validation selects, "last", or a number.
        moved: Where weights and the rest are now.
        threads: Number of CPU threads; None for those of the run.

    Raises:
        BenchmarkError: There is no such run, it saved nothing at the step, its pretrained weights are not these, or
            nothing says the names of its classes.
    """
    load(moved.imports)
    saved = _find_soup(run) or find_saved(run, step)
    record = saved.record
    check_known(record, run)
    ways.pin(record)
    given, hparams = recorded_arguments(record, moved)
    args = replace(given, threads=threads or given.threads).complete()
    if (saved_as := record.get("derived", {}).get("saved_as")) is not None:  # merged weights, of no objective
        args = replace(args, algorithm=saved_as)
        hparams = {name: value for name, value in hparams.items() if name != OBJECTIVE}
    args = replace(args, algorithm=canonical_name(split_derived(args.algorithm)[0]))
    hparams = {**args.resolve_hparams(), **hparams}
    set_up_process(args)
    inputs = backbones.inputs(hparams["backbone"], hparams["image_size"], args.input_stats)
    classes = _find_classes(run, saved, args.data_dir)
    num_domains = len(record["environments"]) - len(record["args"]["test_envs"])
    algorithm = make_algorithm(args, hparams, inputs, classes, num_domains)
    now = {
        "args": record["args"] | {"algorithm": args.algorithm},
        "hparams": record["hparams"] | {"weights": hparams["weights"]},
        "weights_digest": backbones.digest(hparams["weights"], hparams["backbone"]),
        "backbone_digest": getattr(algorithm, "backbone_digest", None),
        "sources": own_sources(type(algorithm), Algorithm),
    }
    check_same(record, now, run)
    load_weights(algorithm, saved.folder)
    return Classifier(record, algorithm, inputs, classes)


def _find_soup(run: RunFolder) -> Saved | None:
    """The record and the weights of a derived run that saved some; None of any other run."""
    if run.state is not State.DONE or "derived" not in (record := read_records(run)[-1]):
        return None
    folder = run.path / "selected"
    return Saved(record, folder) if folder.is_dir() else None


def _find_classes(run: RunFolder, saved: Saved, data_dir: str | None) -> tuple[str, ...]:
    """The names of the classes: from the saved weights, from the predictions, or from the data set."""
    if names := _read_class_names(saved.folder):
        return tuple(names)
    try:
        return load_predictions(run).classes
    except BenchmarkError:
        pass
    try:
        kind = DATASETS[saved.record["args"]["dataset"]]
        return tuple(map(str, kind(data_dir, [0], dict(saved.record["hparams"])).classes))
    except BenchmarkError as error:
        raise BenchmarkError(
            f"{run.path} does not keep the names of its classes, and its data set cannot be read ({error}): give "
            "--data_dir that of the run"
        ) from error


def _read_class_names(folder: Path) -> Sequence[str] | None:
    """The names of the classes that saved weights say; None if they say none."""
    path = next((path for name in ("adapter.json", TRAINED) if (path := folder / name).is_file()), None)
    if path is None:
        return None
    try:
        if path.suffix == ".json":
            description = dict(json.loads(path.read_text(encoding="utf-8")))
        else:
            with safe_open(path, framework="pt") as file:
                description = dict(json.loads((file.metadata() or {}).get("model", "{}")))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise BenchmarkError(f"{path} cannot be read ({error}): run it again") from error
    return description.get("class_names")
