"""Predictions in a file of packed runs: of each image the predicted class and its probability in percent.

Accuracies, confusions and which images are right follow exactly. The probability is within about one percentage point,
and those of the other classes are taken to be equal: calibration is close, and an ensemble over trials is an
approximation. The content is safetensors:

facts              JSON: format, step, selection, environments, classes
env0.predicted     int32 [images]
env0.probability   uint8 [images]: percent; 255 where no logit is the highest
env0.labels        int32 [images]
env0.splits        uint8 [images]: place in `SPLITS`
env0.names         names of the images: a JSON list
"""

import json

import torch
from safetensors.torch import load, save
from torch import Tensor

from domainbed_ext.runs.predictions import FILES, Part, Predictions
from domainbed_ext.system import strict_json

FORMAT = 1
_FIELDS = ("predicted", "probability", "labels", "splits", "names")
_NOT_FINITE = 255
_LARGEST = 0.9975  # what 100 % stands for: the middle of what is rounded to it


def encode(predictions: Predictions) -> bytes:
    """Makes the content of a file.

    Args:
        predictions: What a run predicted.
    """
    facts = {
        "format": FORMAT,
        "step": predictions.step,
        "selection": predictions.selection,
        "environments": list(predictions.parts),
        "classes": list(predictions.classes),
    }
    tensors = {"facts": _pack_json(facts)}
    for env, part in enumerate(predictions.parts.values()):
        highest, predicted = part.logits.softmax(1).max(1)
        percent = (100 * highest).round().where(part.logits.amax(1).isfinite(), _NOT_FINITE)
        values = (predicted.int(), percent.byte(), part.labels.int(), part.splits, _pack_json(part.names))
        tensors |= {f"env{env}.{name}": value for name, value in zip(_FIELDS, values, strict=True)}
    return save(tensors)


def decode(content: bytes) -> Predictions:
    """Reads the content of a file.

    Args:
        content: From `encode`.

    Returns:
        Predictions with logits of which the highest is the predicted class, with its probability.

    Raises:
        SafetensorError: It is damaged.
        ValueError: It is damaged, or from a later version.
        KeyError: It is damaged.
        TypeError: It is damaged.
    """
    tensors = load(content)
    facts = json.loads(tensors["facts"].numpy().tobytes())
    if facts["format"] != FORMAT:
        raise ValueError(f"format {facts['format']}, which needs a later version of domainbed_ext")
    if facts["selection"] not in FILES or not facts["classes"]:
        raise ValueError("neither the selected nor the last step, or no classes")
    parts = {
        label: _read_part(len(facts["classes"]), *(tensors[f"env{env}.{name}"] for name in _FIELDS))
        for env, label in enumerate(facts["environments"])
    }
    return Predictions(int(facts["step"]), facts["selection"], parts, tuple(facts["classes"]))


def _read_part(
    classes: int, predicted: Tensor, probability: Tensor, labels: Tensor, splits: Tensor, names: Tensor
) -> Part:
    """The predictions of an environment."""
    images = tuple(json.loads(names.numpy().tobytes()))
    predicted, labels = predicted.long(), labels.long()
    if not {len(images)} == {len(each) for each in (predicted, probability)}:
        raise ValueError("as many names as predictions are needed")
    if any(((each < 0) | (each >= classes)).any() for each in (predicted, labels)):
        raise ValueError("a class that is none of the data set's")
    # At least a little above chance, so that the predicted class stays the highest.
    highest = (probability / 100).clamp(min(1 / classes + 0.005, _LARGEST), _LARGEST)
    logits = ((1 - highest) / max(classes - 1, 1)).log()[:, None].repeat(1, classes)
    logits.scatter_(1, predicted[:, None], highest.log()[:, None])
    logits[probability == _NOT_FINITE] = torch.nan
    return Part.of_splits(images, logits, labels, splits)


def _pack_json(value: object) -> Tensor:
    return torch.frombuffer(bytearray(strict_json.dumps(value).encode("ascii")), dtype=torch.uint8)
