"""Loads weights from a file into a timm model, whatever the prefixes, layout and size of position embeddings.

Every conversion is reported on stderr, and weights that do not fit are an error: no weight of a backbone keeps its
random initialisation.
"""

import importlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import model_entrypoint
from torch import Tensor

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import conversions, transformers_layout

FILE = "model.safetensors"  # in a folder
_PATCHES = "patch_embed.proj.weight"
_COUNTS = "num_batches_tracked"  # which older checkpoints of batch norm lack, and no output depends on


@dataclass(frozen=True)
class _Reading:
    """An interpretation of a file.

    Attributes:
        tensors: Tensors by the model's names.
        changes: What was done to them, for the report.
        left_out: Names in the file of tensors that have no place in a backbone.
    """

    tensors: dict[str, Tensor]
    changes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def find(path: Path) -> Path:
    """Finds the weights file of a path: the file itself, or the one in a folder.

    Raises:
        BenchmarkError: If there is none, or it is pickled.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        file = path / FILE if path / FILE in files or len(files) != 1 else files[0]
        if len(files) > 1 and file not in files:
            raise BenchmarkError(
                f"{path} holds several .safetensors files and no {FILE}: give one of them by --weights"
            )
        pickled = sorted(path.glob("*.bin")) + sorted(path.glob("*.pt*"))
        path = file if file.exists() or not pickled else pickled[0]
    if not path.is_file():
        raise BenchmarkError(
            f"no weights file {path}: give --weights a .safetensors file, or leave it out for timm's own"
        )
    if path.suffix != ".safetensors":
        raise BenchmarkError(
            f"{path} is not a .safetensors file: convert it (pickled weights can run code, so are not read)"
        )
    return path


def load(model: Any, name: str, path: Path) -> None:
    """Loads all weights of a file except the head's.

    Args:
        model: Model of timm's, already of the image size that it will get.
        name: Its name, for messages.
        path: File, or a folder that holds one.

    Raises:
        BenchmarkError: If it cannot be read, lacks a weight of the model, or has one that the model lacks; the message
            names them.
    """
    path = find(path)
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BenchmarkError(f"{path} is not a complete .safetensors file ({error}): download it again") from error
    head = _head_names(model)
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith(head)}
    closest: list[str] | None = None
    for reading in _readings(stored, wanted, model, path):
        tensors = {key: value for key, value in reading.tensors.items() if not key.startswith(head)}
        misfits = _misfits(wanted, tensors)
        if not misfits:
            model.load_state_dict(tensors, strict=False)
            unused = (f"not used: {_listed(list(reading.left_out))}",) if reading.left_out else ()
            conversions.report(path, "; ".join((*reading.changes, *unused)))
            return
        if closest is None or len(misfits) < len(closest):
            closest = misfits
    assert closest is not None  # the file as it is comes first
    raise BenchmarkError(
        f"{path} does not fit {name}: {_listed(closest)}; give a file of that architecture, or that file's --backbone"
    )


def resampled(before: dict[str, Tensor], after: dict[str, Tensor]) -> tuple[str, ...]:
    """What of a model's tensors has another size than before, for the report; empty if nothing."""
    changed = [
        f"{key} from {list(before[key].shape)} to {list(after[key].shape)}"
        for key in after
        if key in before and before[key].shape != after[key].shape
    ]
    return (f"resampled by timm: {_listed(changed)}",) if changed else ()


def _readings(stored: dict[str, Tensor], wanted: dict[str, Tensor], model: Any, path: Path) -> Iterator[_Reading]:
    """The interpretations of a file, the likeliest first."""
    plain = [_Reading(stored)]
    if prefix := _prefix(stored, wanted, path):
        inside = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
        outside = tuple(key for key in stored if not key.startswith(prefix))
        plain.append(_Reading(inside, (f"read without the prefix {prefix!r}",), outside))
    if found := transformers_layout.to_timm(stored):
        converted, outside_backbone = found
        plain.append(_Reading(converted, ("read in the layout of transformers",), tuple(outside_backbone)))
    yield from plain
    for reading in plain:
        if tensors := _converted(reading.tensors, model):
            renamed = ("converted by timm",) if tensors.keys() != reading.tensors.keys() else ()
            changes = (*reading.changes, *renamed, *resampled(reading.tensors, tensors))
            yield _Reading(tensors, changes, reading.left_out)


def _prefix(stored: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> str:
    """What stands before the model's names in the file, e.g. "module."; empty if nothing."""
    counts: Counter[str] = Counter()
    for key in stored:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in wanted:
                counts[".".join([*parts[:i], ""])] += 1
    needed = sum(not key.endswith(_COUNTS) for key in wanted)
    whole = sorted(prefix for prefix, count in counts.items() if count >= needed)
    if len(whole) > 1:
        raise BenchmarkError(
            f"{path} holds this model {len(whole)} times, under the prefixes {', '.join(map(repr, whole))}: save one "
            "of them to a file of its own, e.g. by safetensors.torch.save_file"
        )
    prefix, count = counts.most_common(1)[0] if counts else ("", 0)
    return prefix if 2 * count > needed else ""


def _converted(tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor] | None:
    """The tensors through timm's own conversion of checkpoints of this architecture; None if it cannot."""
    entrypoint = model_entrypoint(model.pretrained_cfg["architecture"])
    convert = getattr(importlib.import_module(entrypoint.__module__), "checkpoint_filter_fn", None)
    projection = tensors.get(_PATCHES)
    here = model.state_dict().get(_PATCHES)
    if convert is None or (projection is not None and here is not None and projection.shape[2:] != here.shape[2:]):
        return None  # patches of another size are those of another backbone, and not to be resampled
    try:
        converted = convert(dict(tensors), model)
    except Exception:  # made for what timm's authors met: any other file may make it stumble anywhere
        return None
    return {key: value for key, value in converted.items() if isinstance(value, Tensor)}


def _head_names(model: Any) -> tuple[str, ...]:
    """How timm's names of the classifier's tensors begin, e.g. ("head.",)."""
    classifier = model.pretrained_cfg.get("classifier", "head") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return tuple(f"{name}." for name in names)


def _misfits(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    shapes = [
        f"{key} is {_shape(key, found[key])} instead of {_shape(key, wanted[key])}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    formats = [
        f"{key} is {_format(found[key])} instead of {_format(wanted[key])}"
        for key in wanted
        if key in found and wanted[key].is_floating_point() and not _holds_weights(found[key])
    ]
    missing = [f"{key} is missing" for key in wanted if key not in found and not key.endswith(_COUNTS)]
    unexpected = [f"{key} is not in the model" for key in found if key not in wanted]
    return shapes + formats + missing + unexpected


def _shape(name: str, tensor: Tensor) -> str:
    patches = f" (patches of {tensor.shape[-1]} pixels)" if name == _PATCHES and tensor.dim() == 4 else ""
    return f"{list(tensor.shape)}{patches}"


def _holds_weights(tensor: Tensor) -> bool:
    """Whether the numbers are the weights, which those of 8 bits are not without their scales."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def _format(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listed(names: list[str]) -> str:
    return "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
