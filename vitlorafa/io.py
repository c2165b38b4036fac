"""Adapters on disk: a folder with `adapter.safetensors` and `adapter.json`, kilobytes beside the backbone.

Or the two files of PEFT, see `vitlorafa.peft_format`.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vitlorafa import peft_format
from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError, unknown
from vitlorafa.inject import adapted_state, adapter_layers, head_parameters, inject, remove

FORMAT = 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"
FILES = {"vitlorafa": (TENSORS, DESCRIPTION), "peft": (peft_format.TENSORS, peft_format.CONFIG)}


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    head: bool = False,
    metadata: dict[str, Any] | None = None,
    format: str = "vitlorafa",
) -> Path:
    """Writes the adapter, and the head if asked, without the backbone.

    Each file appears whole or not at all: a crash leaves what was there before, or something that `load_adapter`
    refuses. The folder then holds this adapter alone, in this format.

    Args:
        model: An adapted model, merged or not.
        folder: Where to; made if needed.
        head: Whether to save the classifier too.
        metadata: Anything else that JSON can hold, kept under "metadata".
        format: "vitlorafa", or "peft" for a folder that `peft.PeftModel.from_pretrained` loads onto the same timm
            model, with the same output, and `load_adapter` as it was.

    Returns:
        The folder.

    Raises:
        AdapterError: If the model is not adapted, has no head to save, or has layers that PEFT cannot adapt, or if
            the format is unknown.
    """
    if format not in FILES:
        raise unknown("adapter format", format, FILES)
    heads = head_parameters(model) if head else {}
    description = {
        "format": FORMAT,
        "architecture": _architecture(model),
        "config": adapted_state(model).config.to_dict(),
        "layers": {name: list(layer.projections) for name, layer in adapter_layers(model)},
        "head": list(heads),
        "metadata": metadata or {},
    }
    encode = peft_format.encode if format == "peft" else _encode
    files = encode(model, description, heads)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if format == "peft":  # whose config has no checksum: without it, the new tensors cannot be taken for the old
        (folder / peft_format.CONFIG).unlink(missing_ok=True)
    for name, data in files.items():
        _write(folder / name, data)
    for name in {name for names in FILES.values() for name in names} - files.keys():
        (folder / name).unlink(missing_ok=True)
    return folder


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, head: bool | Literal["auto"] = "auto"
) -> nn.Module:
    """Loads what `save_adapter` wrote, exactly, or a LoRA that PEFT saved for a timm vision transformer.

    A model without adapters gets them by the saved config, and a trainable head if one is loaded. An adapted
    one keeps its config, for instance to go on training the other factor. PEFT does not save which factor trains:
    both do then, and a LoRA on a fused qkv becomes one for each of q, k and v, with the same output.

    Args:
        model: The architecture that the adapter was saved from.
        folder: Where from.
        head: Whether to load the classifier too; "auto" does if one was saved.

    Returns:
        The same model.

    Raises:
        AdapterError: If the files are missing or damaged, or do not fit the model, naming the tensors that do
            not, or if PEFT's hold more than an AdapterConfig can say. The model is then as before.
    """
    folder = Path(folder)
    if (folder / peft_format.CONFIG).exists():
        if (folder / DESCRIPTION).exists():
            raise AdapterError(f"{folder} holds both {DESCRIPTION} and {peft_format.CONFIG}: delete the stale one")
        description, tensors = peft_format.read(model, folder)
    else:
        description, tensors = _read(folder)
    if head == "auto":
        head = bool(description["head"])
    elif head and not description["head"]:
        raise AdapterError(f"{folder} holds no head: save_adapter(..., head=True), or load with head=False")
    if not head:
        for name in description["head"]:
            tensors.pop(name, None)

    fresh = not hasattr(model, "_vitlorafa")
    if fresh:
        inject(model, AdapterConfig.from_dict(description["config"]), train_head=head)
    try:
        _check_fit(model, folder, description, tensors, head)
    except AdapterError:
        if fresh:
            remove(model)
        raise
    parameters = dict(model.named_parameters())
    merged = [layer for _, layer in adapter_layers(model) if layer.merged]
    with torch.no_grad():
        for layer in merged:
            layer.unmerge()
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
        for layer in merged:
            layer.merge()
    return model


def _factors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{factor}": getattr(layer, factor)
        for name, layer in adapter_layers(model)
        for factor in ("lora_A", "lora_B")
    }


def _architecture(model: nn.Module) -> str | None:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("architecture")


def _encode(model: nn.Module, description: dict[str, Any], heads: dict[str, nn.Parameter]) -> dict[str, bytes]:
    tensors = _factors(model) | heads
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    description = description | {"sha256": hashlib.sha256(data).hexdigest()}  # so that neither file goes with another
    return {TENSORS: data, DESCRIPTION: (json.dumps(description, indent=2) + "\n").encode()}


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        data = (folder / TENSORS).read_bytes()
    except (OSError, ValueError) as error:
        raise AdapterError(f"no adapter can be read from {folder}: {error}") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise AdapterError(f"{folder / DESCRIPTION} is not of adapter format {FORMAT}")
    missing = [key for key in ("config", "layers", "head", "sha256") if key not in description]
    if missing:
        raise AdapterError(f"{folder / DESCRIPTION} lacks {', '.join(missing)}")
    if hashlib.sha256(data).hexdigest() != description["sha256"]:
        raise AdapterError(f"{folder / TENSORS} is damaged or of another save than {DESCRIPTION}: save it again")
    try:
        return description, safetensors.torch.load(data)
    except SafetensorError as error:
        raise AdapterError(f"{folder / TENSORS} cannot be read: {error}") from None


def _check_fit(
    model: nn.Module, folder: Path, description: dict[str, Any], tensors: dict[str, Tensor], head: bool
) -> None:
    saved, here = AdapterConfig.from_dict(description["config"]), adapted_state(model).config
    if saved.scale != here.scale:
        raise AdapterError(f"{folder} was trained with scale {saved.scale:g}, the model has {here.scale:g}")
    expected: dict[str, Tensor] = _factors(model)
    if head:
        for name, parameter in head_parameters(model).items():
            expected[name] = parameter
            classes = len(tensors.get(name, parameter))
            if classes != len(parameter):
                raise AdapterError(
                    f"the saved head has {classes} classes and the model {len(parameter)}: create the model with "
                    f"num_classes={classes}, or load with head=False"
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
            f"{_architecture(model) or type(model).__name__} in {len(misfits)} places: {first}"
        )
