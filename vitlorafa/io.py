"""Saving and loading adapters, without the backbone, see `vitlorafa.adapter_folder`.

Names in files are those within the timm model, also where another module wraps or holds it.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitlorafa import adapter_folder, frozen_factor, origin, peft_format, trained
from vitlorafa.adapted import adapted_state, adapter_layers, check_one_adapter, classifiers, timm_model
from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError, abbreviate, unknown, warn
from vitlorafa.inject import detach_adapters, inject_layers
from vitlorafa.inputs import check_model, to_folder
from vitlorafa.metadata import to_json_entries
from vitlorafa.named_adapters import using_adapter
from vitlorafa.named_sites import config_sites
from vitlorafa.sharding import assign, gather, gather_parameters, is_writer, wait_for_all
from vitlorafa.sites import in_blocks
from vitlorafa.wrappers import unwrap


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    head: bool | None = None,
    metadata: Mapping[str, Any] | None = None,
    format: str | None = None,
    class_names: Sequence[str] | None = None,
    only_trained: bool = False,
    adapter: str | None = None,
    prefix: str | None = None,
) -> Path:
    """Saves the adapter, everything else that trained, and optionally the head. The backbone is not saved.

    "Everything else that trained" means each parameter outside the head that requires a gradient, such as unfrozen
    norms, and each buffer that changed since `inject`, such as the statistics of a BatchNorm.

    Files are written atomically: a crash leaves the previous adapter, or a folder that `load_adapter` refuses. Files
    of another format are removed from the folder.

    Args:
        model: Adapted model, merged or not, or a module that wraps or holds it: `torch.compile`, DDP, FSDP, a Lightning
            module. Under DDP or FSDP only the first process writes. If the model is sharded, all processes have to
            call; they return when the files are written.
        folder: Folder to write to; it is created if missing.
        head: Whether to save the classifier with its buffers. If None, it is not saved, with a warning if it trains.
        metadata: Additional values, saved under "metadata": JSON values, numbers and small arrays of NumPy and torch,
            paths, enums and dataclasses. Numbers that are not finite become null.
        format: "peft" for a folder that `peft.PeftModel.from_pretrained` loads onto the same timm model with the same
            outputs, and that `load_adapter` loads without loss. "vitlorafa" for a smaller folder that PEFT does not
            read. If None, "peft" wherever PEFT can represent the adapter.
        class_names: Names of the classes in the order of the logits.
        only_trained: Whether to leave out the frozen factor, half of the file, which is drawn again from its seed when
            the adapter is loaded. Loading checks its digest, since another machine or version of torch may draw another
            one. Where that may be the case, save the whole adapter.
        adapter: Name of the adapter, if the model has several; if None, the active one.
        prefix: Name of the adapted model within `model`, if it holds several.

    Returns:
        The folder.

    Raises:
        AdapterError: If the model is not adapted, has no head to save, or has parts that PEFT's format cannot hold, if
            the format is unknown, if JSON cannot hold the metadata, if the frozen factor cannot be left out, or if the
            folder cannot be written.

    Warns:
        AdapterWarning: If the head trains and `head` does not say whether to save it.
    """
    if format not in (None, *adapter_folder.FORMATS):
        raise unknown("adapter format", format, adapter_folder.FORMATS)
    folder = to_folder(folder)
    check_model(model)
    if only_trained and format == "peft":
        raise AdapterError("PEFT cannot draw a frozen factor: save with format='vitlorafa' or only_trained=False")
    inner = timm_model(model, prefix)
    names, entries = adapted_state(inner).adapters, to_json_entries(metadata)
    check_one_adapter(inner)
    if adapter is not None and adapter not in names:
        raise unknown("adapter", adapter, names)
    with using_adapter(model, inner, adapter):
        if head is None and any(p.requires_grad for module in classifiers(inner) for p in module.parameters()):
            warn(f"the head trains and is not saved to {folder}: add head=True, or head=False to leave it out")
        return _save(model, inner, folder, bool(head), entries, format, class_names, only_trained, whole=not prefix)


def _save(
    model: nn.Module,
    inner: nn.Module,
    folder: Path,
    head: bool,
    entries: dict[str, Any],
    format: str | None,
    class_names: Sequence[str] | None,
    only_trained: bool,
    whole: bool,
) -> Path:
    """Saves the active adapter.

    Args:
        model: The timm model, or a module that holds it.
        inner: The timm model.
        folder: Folder to write to.
        head: Whether to save the classifier.
        entries: Metadata as JSON values.
        format: Format to write; if None, PEFT's if it can represent the adapter.
        class_names: Names of the classes.
        only_trained: Whether to leave out the frozen factor.
        whole: Whether to save what trained around the timm model.
    """
    adapted = adapted_state(inner)
    with gather_parameters(model):
        factors, heads = trained.factors(inner), trained.head_tensors(inner) if head else {}
        extra, outside = trained.extra_tensors(inner), trained.trained_outside(unwrap(model), inner) if whole else {}
        tensors = factors | heads | extra | outside
        _check_values(tensors)
        layers = dict(adapter_layers(inner))
        description = {
            "format": adapter_folder.FORMAT,
            **origin.describe_model(inner, _check_class_names(class_names, inner)),
            "digests": _digests(inner, layers),
            "config": adapted.config.to_dict(),
            "layers": {name: list(layer.projections) for name, layer in layers.items()},
            "head": list(heads),
            "extra": list(extra),
            "outside": list(outside),
            "metadata": entries,
        }
        gathered = {name: gather(tensor) for name, tensor in tensors.items()}
        if only_trained:
            order = [site.name for site in config_sites(inner, adapted.config) if site.name in layers]
            description, gathered = frozen_factor.leave_out(description, gathered, order, adapted.seed)
        for_peft = format == "peft" or not (format or only_trained or peft_format.obstacle(inner, gathered))
        files = adapter_folder.encode(description, gathered, inner if for_peft else None)
    try:
        if is_writer(model):
            adapter_folder.write(folder, files)
    finally:
        wait_for_all(model)
    return folder


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    head: bool | Literal["auto"] = "auto",
    adapter: str | None = None,
    prefix: str | None = None,
) -> nn.Module:
    """Loads an adapter of `save_adapter`, or a LoRA that PEFT saved for a timm vision transformer.

    A model without adapters gets them from the saved config, in exactly the layers that the file names; other saved
    parameters become trainable. A model that is already adapted keeps its config, so that, for example, the other
    factor can be trained next. PEFT does not save which factor trains, so both do. A PEFT LoRA on a fused qkv becomes
    one adapter for each of q, k and v that it changes, with the same outputs.

    Args:
        model: Model of the architecture that the adapter was saved from, or a module that wraps or holds it.
        folder: Folder to read.
        head: Whether to load the classifier too. "auto" loads it if it was saved and the model has one.
        adapter: Name of the adapter to load it as, one of the model's or a new one, beside the others: `set_adapter`
            makes it active. If None, the active one; a model without adapters gets one named "default".
        prefix: Name of the timm model within `model`, if it holds several.

    Returns:
        The same model.

    Raises:
        AdapterError: If the files are missing or damaged, if they do not fit the model (the message names the tensors),
            or if they use features of PEFT that an AdapterConfig cannot express. The model is then unchanged.

    Warns:
        AdapterWarning: If the pretrained weights, the input or the classes differ from those that the adapter was
            trained with, or if a file without a digest of the weights leaves out layers of its targets.
    """
    folder = to_folder(folder)
    check_model(model)
    inner = timm_model(model, prefix)
    check_one_adapter(inner)
    description, tensors = adapter_folder.read(folder, inner)
    with using_adapter(model, inner, adapter):
        _load(model, inner, folder, description, tensors, head)
    return model


def _load(
    model: nn.Module,
    inner: nn.Module,
    folder: Path,
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    head: bool | str,
) -> None:
    """Loads what was read from a folder into the active adapter, or a new one if the model has none."""
    head = _loads_head(inner, folder, description, head)
    if not head:
        for name in description["head"]:
            tensors.pop(name, None)
    with gather_parameters(model, write=True):
        digests = _digests(inner, description["layers"])
        is_new = "_vitlorafa" not in vars(inner)
        if is_new:
            config = AdapterConfig.from_dict(description["config"])
            inject_layers(model, inner, config, description["layers"], train_head=head, blank=True)
            adapted_state(inner).seed = config.seed
        try:
            destinations = _find_destinations(unwrap(model), inner, folder, description, tensors, head)
        except AdapterError:
            if is_new:
                detach_adapters(model, inner)
            raise
        if is_new and not description.get("digests") and (left_out := _layers_left_out(inner, description)):
            warn(f"{folder} has no adapter for {abbreviate(left_out)}: these layers stay without one")
        for sentence in origin.mismatches(description, inner, digests, head):
            warn(f"{folder}: {sentence}")
        factors = trained.factors(inner)
        for name, tensor in destinations.items() if is_new else ():
            if name not in factors and not name.startswith(trained.OUTSIDE):
                adapted_state(inner).originals[name] = tensor.detach().clone()
        _copy(inner, tensors, destinations)
        if is_new:
            for name in tensors.keys() & destinations.keys() - factors.keys():
                if isinstance(destinations[name], nn.Parameter):
                    destinations[name].requires_grad_(True)


def _loads_head(model: nn.Module, folder: Path, description: dict[str, Any], head: bool | str) -> bool:
    if head == "auto":
        if description["head"] and not trained.has_head(model):
            warn(f"{folder} has a head, but the model has none: the head is not loaded")
            return False
        return bool(description["head"])
    if head and not description["head"]:
        raise AdapterError(f"{folder} has no head: save it with save_adapter(..., head=True), or load with head=False")
    return bool(head)


def _find_destinations(
    root: nn.Module,
    inner: nn.Module,
    folder: Path,
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    head: bool,
) -> dict[str, Tensor]:
    """The tensor of the model for each tensor of the file; checks that they fit."""
    own = trained.state_tensors(inner)
    heads = trained.head_tensors(inner) if head else {}
    if "extra" not in description:  # from an earlier version or PEFT, which leave out parts of the head
        missing = [name for name in heads if name not in description["head"]]
        if missing:
            warn(f"{folder} lacks {abbreviate(missing)}: the model keeps its own values, so outputs may differ")
        heads = {name: tensor for name, tensor in heads.items() if name not in missing}
    expected = trained.factors(inner) | heads
    expected |= {name: own[name] for name in description.get("extra", ()) if name in own}
    fitting = {name: tensor for name, tensor in tensors.items() if not name.startswith(trained.OUTSIDE)}
    _check_fit(inner, folder, description, fitting, expected)
    around = trained.tensors_outside(root, inner)
    outside = {name: around[name] for name in tensors if name in around and around[name].shape == tensors[name].shape}
    left_out = [name.removeprefix(trained.OUTSIDE) for name in tensors.keys() - fitting.keys() - outside.keys()]
    if left_out:
        warn(f"{folder} also has {abbreviate(sorted(left_out))} of a module around the timm model: not loaded")
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
        raise AdapterError(
            f"{folder} was trained with scale {saved.scale:g}, but the model has {here.scale:g}: use the same rank, "
            "alpha and rank_stabilised"
        )
    for name in (name for name in description["head"] if name in expected and name in tensors):
        classes, classes_here = (each.shape[:1] for each in (tensors[name], expected[name]))
        if classes != classes_here and tensors[name].shape[1:] == expected[name].shape[1:]:
            raise AdapterError(
                f"the saved head has {classes[0]} classes, but the model has {classes_here[0]}: create the model with "
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
        places = f"{len(misfits)} place{'s' * (len(misfits) > 1)}"
        first = "; ".join(misfits[:3]) + ("; ..." if len(misfits) > 3 else "")
        raise AdapterError(
            f"{folder}, saved from {description.get('architecture') or 'an unnamed model'}, does not fit this "
            f"{origin.describe_model(model)['architecture'] or type(model).__name__} in {places}: {first}"
        )


def _layers_left_out(model: nn.Module, description: dict[str, Any]) -> list[str]:
    """Layers of the config's targets that the file does not name, as in files of PEFT or of earlier versions."""
    config = adapted_state(model).config
    sites = [
        site for site in in_blocks(model, config_sites(model, config), config.blocks) if config.chosen(site.targets)
    ]
    return [site.name for site in sites if site.name not in description["layers"]]


def _copy(model: nn.Module, tensors: dict[str, Tensor], destinations: dict[str, Tensor]) -> None:
    merged = [layer for _, layer in adapter_layers(model) if layer.merged]
    with torch.no_grad():
        for layer in merged:
            layer.unmerge()
        for name in sorted(tensors):  # the same order in all processes
            if name in destinations:
                assign(destinations[name], tensors[name])
        for layer in merged:
            layer.merge()


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise AdapterError(
            f"{abbreviate(empty)} is on the meta device and has no values: load the model's weights first"
        )


def _check_class_names(names: Sequence[str] | None, model: nn.Module) -> list[str] | None:
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise AdapterError("class_names must be a list of strings: one name per class, in the order of the logits")
    last = [module for head in classifiers(model) for module in head.modules() if isinstance(module, nn.Linear)][-1:]
    if last and len(names) != last[0].out_features:
        raise AdapterError(f"class_names has {len(names)} names, but the head has {last[0].out_features} classes")
    return list(names)


def _digests(model: nn.Module, layers: Collection[str]) -> dict[str, str]:
    """Digests of the pretrained weights: those at `inject`, or new ones if a state dict was loaded since."""
    reloaded = any(layer.reloaded for _, layer in adapter_layers(model))
    remembered: dict[str, str] = {} if reloaded or "_vitlorafa" not in vars(model) else adapted_state(model).digests
    return remembered or origin.digests(model, layers)
