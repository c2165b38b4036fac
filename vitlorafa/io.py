"""Adapters on disk: a folder with `adapter.safetensors` and `adapter.json`, kilobytes beside the backbone.

Or the two files of PEFT, see `vitlorafa.peft_format`. Names are those within the timm model, whatever is around it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vitlorafa import origin, peft_format, trained
from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError, abbreviate, unknown, warn
from vitlorafa.inject import (
    adapted_state,
    adapter_layers,
    classifiers,
    inject_layers,
    take_out,
    timm_model,
)
from vitlorafa.metadata import to_json
from vitlorafa.sharding import assign, gather, is_writer, wait_for_all, whole
from vitlorafa.sites import linear_sites
from vitlorafa.trained import copy_to_cpu
from vitlorafa.wrappers import plain_name, unwrap

FORMAT = 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"
FILES = {"vitlorafa": (TENSORS, DESCRIPTION), "peft": (peft_format.TENSORS, peft_format.CONFIG)}


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    head: bool = False,
    metadata: Mapping[str, Any] | None = None,
    format: str = "vitlorafa",
    class_names: Sequence[str] | None = None,
    prefix: str | None = None,
) -> Path:
    """Writes the adapter, what else trained, and the head if asked, without the backbone.

    What else trained is every parameter outside the head that requires a gradient, such as norms that were unfrozen,
    and every buffer that is not as before `inject`, such as a BatchNorm's statistics.

    Each file appears whole or not at all: a crash leaves what was there before, or something that `load_adapter`
    refuses. The folder then holds this adapter alone, in this format.

    Args:
        model: An adapted model, merged or not, or what wraps or holds it: `torch.compile`, DDP, FSDP, a Lightning
            module. Wrapped in DDP or sharded, it is written by the first process alone; if it is sharded, all have to
            call, and return when it is written.
        folder: Where to; made if needed.
        head: Whether to save the classifier too, its buffers included.
        metadata: Anything else, kept under "metadata": what JSON can hold, NumPy's and torch's numbers and small
            arrays, paths, enums and dataclasses. Numbers that are not finite become null.
        format: "vitlorafa", or "peft" for a folder that `peft.PeftModel.from_pretrained` loads onto the same timm
            model, with the same output, and `load_adapter` as it was.
        class_names: Names of the classes in the order of the logits, for who uses the adapter.
        prefix: Name of the adapted model within `model`, if it holds several.

    Returns:
        The folder.

    Raises:
        AdapterError: If the model is not adapted, has no head to save, or has what PEFT cannot hold, if the format is
            unknown, if JSON cannot hold the metadata, or if the folder cannot be written.
    """
    if format not in FILES:
        raise unknown("adapter format", format, FILES)
    folder = Path(folder).expanduser()
    inner = timm_model(model, prefix)
    adapted = adapted_state(inner)
    metadata = to_json({} if metadata is None else metadata)
    if not isinstance(metadata, dict):
        raise AdapterError("metadata is not a dict: give it one, from names to values")
    with whole(model):
        factors, heads = trained.factors(inner), trained.head(inner) if head else {}
        extra, outside = trained.extra(inner), {} if prefix else trained.outside(unwrap(model), inner)
        tensors = factors | heads | extra | outside
        _check_values(tensors)
        layers = dict(adapter_layers(inner))
        description = {
            "format": FORMAT,
            **origin.describe_model(inner, _check_class_names(class_names, inner)),
            "digests": _digests(inner, layers),
            "config": adapted.config.to_dict(),
            "layers": {name: list(layer.projections) for name, layer in layers.items()},
            "head": list(heads),
            "extra": list(extra),
            "outside": list(outside),
            "metadata": metadata,
        }
        encode = peft_format.encode if format == "peft" else _encode
        files = encode(inner, description, {name: gather(tensor) for name, tensor in tensors.items()})
    try:
        if is_writer(model):
            _write_all(folder, files)
    finally:
        wait_for_all(model)
    return folder


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    head: bool | Literal["auto"] = "auto",
    prefix: str | None = None,
) -> nn.Module:
    """Loads what `save_adapter` wrote, exactly, or a LoRA that PEFT saved for a timm vision transformer.

    A model without adapters gets them by the saved config, in exactly the layers that the file names, and what was
    saved beside them becomes trainable. An adapted one keeps its config, for instance to train the other factor. PEFT
    does not save which factor trains: both do then, and a LoRA on a fused qkv becomes one for each of q, k and v that
    it changes, with the same output.

    An `AdapterWarning` says if the model's pretrained weights, input or classes are not those that the adapter had, or
    if a file that does not say which weights it belongs to leaves layers of its targets out.

    Args:
        model: The architecture that the adapter was saved from, or what wraps or holds it.
        folder: Where from.
        head: Whether to load the classifier too; "auto" does if one was saved, and the model has one.
        prefix: Name of the timm model within `model`, if it holds several.

    Returns:
        The same model.

    Raises:
        AdapterError: If the files are missing or damaged, or do not fit the model, naming the tensors that do
            not, or if PEFT's hold more than an AdapterConfig can say. The model is then as before.
    """
    folder = Path(folder).expanduser()
    inner = timm_model(model, prefix)
    if (folder / peft_format.CONFIG).exists():
        if (folder / DESCRIPTION).exists():
            raise AdapterError(f"{folder} holds both {DESCRIPTION} and {peft_format.CONFIG}: delete the stale one")
        description, tensors = peft_format.read(inner, folder)
    else:
        description, tensors = _within(inner, *_read(folder))
    head = _is_head_loaded(inner, folder, description, head)
    if not head:
        for name in description["head"]:
            tensors.pop(name, None)
    with whole(model, write=True):
        here = _digests(inner, description["layers"])
        fresh = "_vitlorafa" not in vars(inner)
        if fresh:
            config = AdapterConfig.from_dict(description["config"])
            inject_layers(model, inner, config, description["layers"], train_head=head)
        try:
            targets = _targets(unwrap(model), inner, folder, description, tensors, head)
        except AdapterError:
            if fresh:
                take_out(model, inner)
            raise
        if fresh and not description.get("digests") and (left_out := _left_out(inner, description)):
            warn(f"{folder} has no adapter for {abbreviate(left_out)}: they stay as they are")
        for sentence in origin.mismatches(description, inner, here, head):
            warn(f"{folder}: {sentence}")
        _copy(inner, tensors, targets)
        if fresh:
            for name in tensors.keys() & targets.keys() - trained.factors(inner).keys():
                if isinstance(targets[name], nn.Parameter):
                    targets[name].requires_grad_(True)
    return model


def _encode(model: nn.Module, description: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, bytes]:
    data = safetensors.torch.save(copy_to_cpu(tensors))
    description = description | {"sha256": hashlib.sha256(data).hexdigest()}  # so that neither file goes with another
    return {TENSORS: data, DESCRIPTION: (json.dumps(description, indent=2, allow_nan=False) + "\n").encode()}


def _write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if peft_format.CONFIG in files:  # no checksum: without it, the new tensors cannot be taken for the old
                (folder / peft_format.CONFIG).unlink(missing_ok=True)
            for name, data in files.items():
                _write(folder / name, data)
            for name in {name for names in FILES.values() for name in names} - files.keys():
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or str(error)
        raise AdapterError(f"the adapter cannot be written to {folder} ({reason}): give another folder") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to the folder, so that all its files are of one save; where that is known."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.{get_ident()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        data = (folder / TENSORS).read_bytes()
    except (OSError, ValueError) as error:
        raise AdapterError(f"no adapter can be read from {folder}: {error}") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise AdapterError(f"{folder / DESCRIPTION} is not of adapter format {FORMAT}")
    missing = [key for key in ("config", "layers", "head", "sha256") if key not in description]
    if missing:
        raise AdapterError(f"{folder / DESCRIPTION} lacks {', '.join(missing)}")
    odd = [key for key, is_right in _SHAPES.items() if key in description and not is_right(description[key])]
    if odd:
        raise AdapterError(f"{folder / DESCRIPTION} has no such {', '.join(odd)} as adapters have: save it again")
    if hashlib.sha256(data).hexdigest() != description["sha256"]:
        raise AdapterError(f"{folder / TENSORS} is damaged or of another save than {DESCRIPTION}: save it again")
    try:
        return description, safetensors.torch.load(data)
    except SafetensorError as error:
        raise AdapterError(f"{folder / TENSORS} cannot be read: {error}") from None


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_SHAPES: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: isinstance(value, dict),
    "layers": lambda value: isinstance(value, dict) and all(map(_are_names, value.values())),
    **dict.fromkeys(("head", "extra", "outside"), _are_names),
    **dict.fromkeys(("input", "digests"), lambda value: isinstance(value, dict)),
    "class_names": lambda value: value is None or _are_names(value),
}


def _within(
    model: nn.Module, description: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same by the names within the timm model; earlier versions wrote those of what was given to them."""
    known = {site.name for site in linear_sites(model)}
    first = plain_name(next(iter(description["layers"]), ""))
    parts = first.split(".")
    cut = next((start for start in range(len(parts)) if ".".join(parts[start:]) in known), 0)
    before = "".join(f"{part}." for part in parts[:cut])

    def name(written: str) -> str:
        return written if written.startswith(trained.OUTSIDE) else plain_name(written).removeprefix(before)

    layers = {name(key): projections for key, projections in description["layers"].items()}
    description = description | {"layers": layers, "head": [name(key) for key in description["head"]]}
    return description, {name(key): tensor for key, tensor in tensors.items()}


def _is_head_loaded(model: nn.Module, folder: Path, description: dict[str, Any], head: bool | str) -> bool:
    if head == "auto":
        if description["head"] and not trained.has_head(model):
            warn(f"{folder} holds a head and the model has none: left out")
            return False
        return bool(description["head"])
    if head and not description["head"]:
        raise AdapterError(f"{folder} holds no head: save_adapter(..., head=True), or load with head=False")
    return bool(head)


def _targets(
    root: nn.Module,
    inner: nn.Module,
    folder: Path,
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    head: bool,
) -> dict[str, Tensor]:
    """Where in the model each tensor of the file goes, after a look at whether they fit."""
    here = trained.places(inner)
    heads = trained.head(inner) if head else {}
    if "extra" not in description:  # written by an earlier version, or by PEFT: parts of the head did not train
        missing = [name for name in heads if name not in description["head"]]
        if missing:
            warn(f"{folder} was saved without {abbreviate(missing)}: the model's own stay, and outputs may differ")
        heads = {name: tensor for name, tensor in heads.items() if name not in missing}
    expected = trained.factors(inner) | heads
    expected |= {name: here[name] for name in description.get("extra", ()) if name in here}
    fitting = {name: tensor for name, tensor in tensors.items() if not name.startswith(trained.OUTSIDE)}
    _check_fit(inner, folder, description, fitting, expected)
    around = trained.around(root, inner)
    outside = {name: around[name] for name in tensors if name in around and around[name].shape == tensors[name].shape}
    left_out = [name.removeprefix(trained.OUTSIDE) for name in tensors.keys() - fitting.keys() - outside.keys()]
    if left_out:
        warn(f"{folder} also holds {abbreviate(sorted(left_out))} of a module around the timm model: left out here")
    _check_values(expected | outside)
    return expected | outside


def _check_fit(
    model: nn.Module,
    folder: Path,
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    expected: dict[str, Tensor],
) -> None:
    saved, here = AdapterConfig.from_dict(description["config"]), adapted_state(model).config
    if saved.scale != here.scale:
        raise AdapterError(f"{folder} was trained with scale {saved.scale:g}, the model has {here.scale:g}")
    for name in (name for name in description["head"] if name in expected and name in tensors):
        classes, classes_here = (each.shape[:1] for each in (tensors[name], expected[name]))
        if classes != classes_here and tensors[name].shape[1:] == expected[name].shape[1:]:
            raise AdapterError(
                f"the saved head has {classes[0]} classes and the model {classes_here[0]}: create the model with "
                f"num_classes={classes[0]}, or load with head=False"
            )
    misfits = []
    for name, tensor in expected.items():
        if name not in tensors:
            misfits.append(f"{name} is missing in the file")
        elif tensor.shape != tensors[name].shape:
            shapes = f"{list(tensors[name].shape)} in the file and {list(tensor.shape)} in the model"
            misfits.append(f"{name} is {shapes}")
    misfits += [f"{name} is unknown to the model" for name in sorted(tensors.keys() - expected.keys())]
    for name, layer in adapter_layers(model):
        projections = description["layers"].get(name, list(layer.projections))
        if projections != list(layer.projections):
            misfits.append(f"{name} adapts {projections} in the file and {list(layer.projections)} in the model")
    if misfits:
        first = "; ".join(misfits[:3]) + ("; ..." if len(misfits) > 3 else "")
        raise AdapterError(
            f"{folder}, saved from {description.get('architecture') or 'an unnamed model'}, does not fit this "
            f"{origin.describe_model(model)['architecture'] or type(model).__name__} in {len(misfits)} places: {first}"
        )


def _left_out(model: nn.Module, description: dict[str, Any]) -> list[str]:
    """Layers of the config's targets that the file does not name: from an earlier version, PEFT, or fewer blocks."""
    targets = adapted_state(model).config.targets
    sites = [site for site in linear_sites(model) if set(site.targets) & set(targets)]
    return [site.name for site in sites if site.name not in description["layers"]]


def _copy(model: nn.Module, tensors: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    merged = [layer for _, layer in adapter_layers(model) if layer.merged]
    with torch.no_grad():
        for layer in merged:
            layer.unmerge()
        for name in sorted(tensors):  # in the same order in all processes
            if name in targets:
                assign(targets[name], tensors[name])
        for layer in merged:
            layer.merge()


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise AdapterError(f"{abbreviate(empty)} is on the meta device, without values: load the model's weights first")


def _check_class_names(names: Sequence[str] | None, model: nn.Module) -> list[str] | None:
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise AdapterError("class_names is not a list of names: give one name a class, in the order of the logits")
    last = [module for head in classifiers(model) for module in head.modules() if isinstance(module, nn.Linear)][-1:]
    if last and len(names) != last[0].out_features:
        raise AdapterError(f"there are {len(names)} class_names, and the head has {last[0].out_features} classes")
    return list(names)


def _digests(model: nn.Module, layers: Collection[str]) -> dict[str, str]:
    """Digests of the weights that the adapter belongs to: as it found them, or as a state dict brought since."""
    reloaded = any(layer.reloaded for _, layer in adapter_layers(model))
    kept: dict[str, str] = {} if reloaded or "_vitlorafa" not in vars(model) else adapted_state(model).digests
    return kept or origin.digests(model, layers)
