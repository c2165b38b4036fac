"""What a finished run predicted: the logits of every evaluated image, at the selected and at the last step.

A file holds one step. It has, for each environment, the images in the order of the data set:

env0.logits   float16 [images, classes], rounded so that the predicted class stays the same
env0.labels   int32 [images]
env0.splits   uint8 [images]: place in `SPLITS` of the split that the image was in
env0.names    names of the images: a JSON list, compressed by zlib

The step, the labels of the environments and the names of the classes are JSON in the file's metadata. The accuracies in
the record of the step follow from the file, to the last digit.
"""

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import SPLITS, Split, best_step
from domainbed_ext.runs.folder import DERIVED, PREDICTIONS_LAST, PREDICTIONS_SELECTED, RunFolder
from domainbed_ext.runs.saved import BEST, LAST, find_saved
from domainbed_ext.system import strict_json
from domainbed_ext.system.commands import format_command
from domainbed_ext.system.files import remove, replace_atomically

if TYPE_CHECKING:
    from torch import Tensor

FILES = {BEST: (PREDICTIONS_SELECTED,), LAST: (PREDICTIONS_LAST, PREDICTIONS_SELECTED)}
"""Files in which to look for the predictions of a step: the last one has its own only if another is selected."""

METADATA = "predictions"


@dataclass(frozen=True)
class Part:
    """The predictions of the images of an environment.

    Attributes:
        names: Names of the images, e.g. "dog/056_0001.jpg".
        logits: Logits [n, classes], float32.
        labels: Labels [n], int64.
        is_held_out: Whether an image was in the `out` split [n], bool.
        is_uda: Whether an image was in the `uda` split [n], bool; None if none was. All others were in `in`.
    """

    names: tuple[str, ...]
    logits: "Tensor"
    labels: "Tensor"
    is_held_out: "Tensor"
    is_uda: "Tensor | None" = None

    @classmethod
    def of_splits(cls, names: tuple[str, ...], logits: "Tensor", labels: "Tensor", splits: "Tensor") -> "Part":
        """The predictions of images whose splits are numbers.

        Args:
            names: Names of the images.
            logits: Logits [n, classes], float32.
            labels: Labels [n], int64.
            splits: Place in `SPLITS` of the split of each image [n], uint8.

        Raises:
            ValueError: The shapes do not fit one another.
        """
        if logits.dim() != 2 or not (len(names),) == logits.shape[:1] == labels.shape == splits.shape:
            raise ValueError("as many names as predictions are needed")
        is_uda = splits == SPLITS.index("uda")
        return cls(names, logits, labels, splits == SPLITS.index("out"), is_uda if is_uda.any() else None)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def splits(self) -> "Tensor":
        """The place in `SPLITS` of the split of each image [n], uint8."""
        import torch

        splits = torch.zeros(len(self), dtype=torch.uint8)
        for number, split in enumerate(SPLITS):
            splits[self.of_split(split)] = number
        return splits

    @property
    def predicted(self) -> "Tensor":
        """The predicted class of each image [n], int64."""
        return self.logits.argmax(1)

    @property
    def is_right(self) -> "Tensor":
        """1 for images that are classified correctly, else 0 [n], float64; NaN for those without a highest logit."""
        return are_right(self.logits, self.labels)

    def of_split(self, split: Split) -> "Tensor":
        """Finds the images of a split.

        Args:
            split: "in", "out" or "uda".

        Returns:
            Whether an image was in the split [n], bool.
        """
        import torch

        is_uda = torch.zeros_like(self.is_held_out) if self.is_uda is None else self.is_uda
        return {"in": ~(self.is_held_out | is_uda), "out": self.is_held_out, "uda": is_uda}[split]


@dataclass(frozen=True)
class Predictions:
    """The predictions of a run after one step.

    Attributes:
        step: Index of the step.
        selection: What the step is: "best" (selected by training-domain validation) or "last".
        parts: Predictions by label of the environment, in the order of the data set.
        classes: Names of the classes.
    """

    step: int
    selection: str
    parts: Mapping[str, Part]
    classes: tuple[str, ...]

    def accuracies(self) -> dict[str, float]:
        """Computes the accuracies, as the record of the step has them.

        Returns:
            Accuracy in [0, 1] by "env0_in_acc" and so on; NaN where logits are not finite.
        """
        accuracies = {}
        for env, part in enumerate(self.parts.values()):
            for split in SPLITS:
                if (chosen := part.of_split(split)).any():
                    accuracies[f"env{env}_{split}_acc"] = float(part.is_right[chosen].mean())
        return accuracies


def are_right(logits: "Tensor", labels: "Tensor") -> "Tensor":
    """1 for images that are classified correctly, else 0; NaN for those without a highest logit.

    Args:
        logits: Logits [n, classes].
        labels: Labels [n].

    Returns:
        [n], float64.
    """
    highest, predicted = logits.max(1)
    return (predicted == labels).double().where(highest.isfinite(), math.nan)


def load_predictions(folder: RunFolder | Path | str, step: str = BEST) -> Predictions:
    """Reads what a run predicted.

    Args:
        folder: Folder of the run.
        step: "best" for the step that training-domain validation selects, or "last".

    Raises:
        BenchmarkError: The run keeps no predictions, or the file cannot be read.
    """
    run = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    path = find_predictions(run, step)
    if path is None and run.path.parent.name == DERIVED:
        raise BenchmarkError(
            f"{run.path} was derived from other runs, of which alone predictions are kept: give the folder of one of "
            "these, which its record lists under derived"
        )
    if path is None:
        raise BenchmarkError(
            f"{run.path} keeps no predictions: add them with {format_command('evaluate')} --run {run.path} "
            "--predictions"
        )
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()[METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        parts = {label: _read_part(tensors, env) for env, label in enumerate(facts["environments"])}
        return Predictions(int(facts["step"]), step, parts, tuple(facts["classes"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise BenchmarkError(
            f"{path} cannot be read ({error}): write it again with {format_command('evaluate')} --run {run.path} "
            "--predictions"
        ) from error


def load_step(folder: RunFolder | Path | str, step: int) -> Predictions | None:
    """Reads what a run predicted after a step.

    Args:
        folder: Folder of the run.
        step: Index of the step.

    Returns:
        Predictions; None if the run keeps none of that step.

    Raises:
        BenchmarkError: A file cannot be read.
    """
    run = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    for which in FILES:
        if find_predictions(run, which) is not None:
            predictions = load_predictions(run, which)
            if predictions.step == step:
                return predictions
    return None


def find_predictions(run: RunFolder, step: str = BEST) -> Path | None:
    """Finds the file of a run's predictions.

    Args:
        run: Folder of the run.
        step: "best" or "last".

    Returns:
        Its path; None if there is none.
    """
    return next((path for name in FILES[step] if (path := run.path / name).is_file()), None)


def save_predictions(folder: RunFolder | Path | str, predictions: Predictions) -> None:
    """Writes what a run predicted; on disk when this returns, and never half written.

    Args:
        folder: Folder of the run.
        predictions: Predictions; their `selection` tells the file.

    Raises:
        OSError: It cannot be written.
    """
    from safetensors import SafetensorError

    from domainbed_ext.models.tensor_files import save_tensors

    run = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    facts = {
        "step": predictions.step,
        "environments": list(predictions.parts),
        "classes": list(predictions.classes),
    }
    tensors: dict[str, Tensor] = {}
    for env, part in enumerate(predictions.parts.values()):
        tensors |= {f"env{env}.{name}": tensor for name, tensor in _write_part(part).items()}

    def write(path: Path) -> None:
        try:
            save_tensors(tensors, path, {METADATA: strict_json.dumps(facts)})
        except SafetensorError as error:  # what a full disk ends in
            raise OSError(f"cannot write predictions ({error})") from error

    replace_atomically(run.path / FILES[predictions.selection][0], write)


def steps_with_predictions(run: RunFolder) -> list[str]:
    """The steps that a finished run keeps predictions of: "best", and "last" if that is another.

    Args:
        run: Folder of the run.

    Raises:
        BenchmarkError: There is no finished run.
    """
    find_saved(run)
    records = run.records()
    return [BEST] if best_step(records)["step"] == max(record["step"] for record in records) else [BEST, LAST]


def has_predictions(run: RunFolder) -> bool:
    """Whether a finished run keeps all its predictions, and they can be read.

    Args:
        run: Folder of the run.
    """
    records = run.records()
    steps = {BEST: best_step(records)["step"], LAST: max(record["step"] for record in records)}
    try:
        return all(load_predictions(run, name).step == step for name, step in steps.items())
    except BenchmarkError:
        return False


def remove_predictions(run: RunFolder, step: str) -> None:
    """Removes the file that a step has of its own, if there is one.

    Args:
        run: Folder of the run.
        step: "best" or "last".
    """
    remove(run.path / FILES[step][0])


def rounded(logits: "Tensor") -> "Tensor":
    """Rounds logits to float16, so that the predicted class stays the same.

    Rounding can make logits equal, of which the first counts: those before the predicted class are lowered by one unit
    in the last place. Finite logits stay finite.

    Args:
        logits: Logits [n, classes], float32, on the CPU.

    Returns:
        [n, classes], float16.
    """
    import numpy as np
    import torch

    largest = torch.finfo(torch.float16).max
    least = -largest + 32  # one unit above the lowest number, so that there is one to lower others to
    half = torch.where(logits.isfinite(), logits.clamp(least, largest), logits).half()
    for row in (half.argmax(1) != logits.argmax(1)).nonzero()[:, 0].tolist():
        values, predicted = half[row].numpy(), int(logits[row].argmax())  # in the memory of `half`
        equal = values[:predicted] == values[predicted]
        values[:predicted][equal] = np.nextafter(values[predicted], np.float16(-np.inf))
    return half


def _write_part(part: Part) -> "dict[str, Tensor]":
    """The tensors of an environment in a file."""
    import torch

    names = zlib.compress(strict_json.dumps(part.names).encode("ascii"))
    return {
        "logits": rounded(part.logits),
        "labels": part.labels.int(),
        "splits": part.splits,
        "names": torch.frombuffer(bytearray(names), dtype=torch.uint8),
    }


def _read_part(tensors: Mapping[str, Any], env: int) -> Part:
    """The predictions of an environment."""
    return Part.of_splits(
        tuple(json.loads(zlib.decompress(tensors[f"env{env}.names"].numpy().tobytes()))),
        tensors[f"env{env}.logits"].float(),
        tensors[f"env{env}.labels"].long(),
        tensors[f"env{env}.splits"],
    )
