"""Predictions as an archive of runs keeps them: of each image the predicted class and its probability in percent.

A file is about a tenth of that of a run, whose logits it does not have. Accuracies, confusion and which images are
right follow exactly. The probability is within about one percentage point, and those of the other classes are taken to
be equal: calibration is close, and an ensemble over trials is an approximation. A file is safetensors:

env0.predicted     int16 [images]
env0.probability   uint8 [images]: percent; 255 where the logits had no highest
env0.labels        int32 [images]
env0.splits        uint8 [images]: place in `SPLITS`
env0.names         names of the images: a JSON list
"""

import json
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from domainbed_ext.model_selection import SPLITS
from domainbed_ext.runs.predictions import Part, Predictions
from domainbed_ext.system import strict_json

_NOT_FINITE = 255
_LARGEST = 0.9975  # what 100 % stands for: the middle of what is rounded to it


def encode(predictions: Predictions) -> bytes:
    """Makes the content of a file.

    Args:
        predictions: What a run predicted.
    """
    tensors: dict[str, Tensor] = {}
    for env, part in enumerate(predictions.parts.values()):
        highest, predicted = part.logits.softmax(1).max(1)
        splits = torch.zeros(len(part), dtype=torch.uint8)
        for number, split in enumerate(SPLITS):
            splits[part.of_split(split)] = number
        percent = (100 * highest).round().where(part.logits.max(1).values.isfinite(), _NOT_FINITE)
        tensors |= {
            f"env{env}.predicted": predicted.short(),
            f"env{env}.probability": percent.byte(),
            f"env{env}.labels": part.labels.int(),
            f"env{env}.splits": splits,
            f"env{env}.names": _text(strict_json.dumps(part.names)),
        }
    facts = {
        "step": predictions.step,
        "selection": predictions.selection,
        "environments": list(predictions.parts),
        "classes": list(predictions.classes),
    }
    return save(tensors | {"facts": _text(strict_json.dumps(facts))})


def decode(content: bytes) -> Predictions:
    """Reads the content of a file.

    Args:
        content: From `encode`.

    Returns:
        Predictions with logits of which the highest is the predicted class, with its probability.

    Raises:
        SafetensorError, ValueError, KeyError, TypeError, IndexError: It is damaged.
    """
    tensors = load(content)
    facts = json.loads(tensors["facts"].numpy().tobytes())
    parts = {
        label: _part({name: tensors[f"env{env}.{name}"] for name in _FIELDS}, len(facts["classes"]))
        for env, label in enumerate(facts["environments"])
    }
    return Predictions(int(facts["step"]), facts["selection"], parts, tuple(facts["classes"]))


_FIELDS = ("predicted", "probability", "labels", "splits", "names")


def _part(tensors: dict[str, Tensor], classes: int) -> Part:
    splits, percent = tensors["splits"], tensors["probability"].float()
    # Above that of chance by what rounding can take, so that the predicted class stays the highest.
    highest = (percent / 100).clamp(min(1 / classes + 0.005, _LARGEST), _LARGEST)
    others = (1 - highest) / max(classes - 1, 1)
    logits = others.log()[:, None].repeat(1, classes)
    logits.scatter_(1, tensors["predicted"].long()[:, None], highest.log()[:, None])
    logits[percent == _NOT_FINITE] = torch.nan
    is_uda = splits == SPLITS.index("uda")
    return Part(
        tuple(json.loads(tensors["names"].numpy().tobytes())),
        logits,
        tensors["labels"].long(),
        splits == SPLITS.index("out"),
        is_uda if is_uda.any() else None,
    )


def _text(text: str) -> Any:
    return torch.frombuffer(bytearray(text.encode("ascii")), dtype=torch.uint8)
