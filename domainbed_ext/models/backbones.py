"""A timm model, its weights and its own input statistics."""

import hashlib
from pathlib import Path
from typing import Any

import timm
from torch import nn

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import backbone_names, conversions, hub_messages, image_sizes, weight_files
from domainbed_ext.models.inputs import IMAGENET_MEAN, IMAGENET_STD, Inputs
from domainbed_ext.protocols import CHOICES
from vitlorafa import classifiers, tensor_bytes

INPUT_STATS = CHOICES["input_stats"]
NO_FILE = ("pretrained", "none")  # what weights may be that are no file of the user's


def inputs(name: str, image_size: int | None = None, stats: str = "backbone") -> Inputs:
    """The images that a backbone takes.

    Args:
        name: Name of the backbone, see `backbone_names.parse`.
        image_size: Pixels a side, in place of the backbone's own.
        stats: "backbone" normalises with the statistics the backbone was trained with; "imagenet" with
            ImageNet's whatever the backbone, as DomainBed does.

    Returns:
        Size, mean and standard deviation.

    Raises:
        BenchmarkError: If the name is unknown, or the backbone does not take that size.
    """
    known = backbone_names.parse(name)
    size = _size(known, image_size)
    image_sizes.options(known, size)
    if stats == "imagenet" or not (known.mean and known.std):
        return Inputs(size, IMAGENET_MEAN, IMAGENET_STD)
    return Inputs(size, known.mean, known.std)


def create(name: str, weights: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """Builds a backbone with a fresh head.

    Args:
        name: Name of the backbone, see `backbone_names.parse`.
        weights: "pretrained" (timm's own way: from the hub, from the package for the embedded one, or from the
            backbone's folder), "none" (random), or a `.safetensors` file or a folder that holds one (see
            `weight_files`), whose head is not used.
        num_classes: Classes of the head, which is drawn from torch's global generator.
        image_size: Pixels a side; position embeddings are resampled if it is not the backbone's own.

    Returns:
        The model; logits are [batch, num_classes].

    Raises:
        BenchmarkError: If the name is unknown, weights cannot be had or do not fit the model, or it does not take
            images of that size or has no head.
    """
    known = backbone_names.parse(name)
    size = _size(known, image_size)
    file = _file(weights, known)
    download = weights == "pretrained" and file is None
    try:
        with hub_messages.one_warning():
            model: Any = timm.create_model(known.timm, pretrained=download, **image_sizes.options(known, size))
    except Exception as error:  # hub clients raise many kinds: no network, no such file, no permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not download:
            raise BenchmarkError(f"{name} cannot be built ({reason}): choose another --backbone") from error
        raise BenchmarkError(
            f"could not get the weights of {name} ({reason}): check the network, or add --weights FILE.safetensors"
        ) from error
    if size != known.input_size[1:]:
        own = model.state_dict()
        image_sizes.resize(model, name, size)
        if file is None:
            conversions.report(name, "; ".join(weight_files.resampled(own, model.state_dict())))
    if file is not None:
        weight_files.load(model, name, file)
    if not hasattr(model, "reset_classifier"):
        raise BenchmarkError(f"{name} is no classifier ({type(model).__name__} has no head): choose another --backbone")
    model.reset_classifier(num_classes)
    return model


def loaded_digest(backbone: nn.Module) -> str:
    """What tells a backbone's parameters and buffers from others', whatever they were loaded from.

    Args:
        backbone: Model of timm's, with adapters or without. Its head, which starts at random, does not count.

    Returns:
        16 hexadecimal digits.
    """
    head = {id(parameter) for classifier in classifiers(backbone) for parameter in classifier.parameters()}
    content = hashlib.blake2b(digest_size=8)
    for name, tensor in backbone.state_dict(keep_vars=True).items():
        if id(tensor) not in head:
            content.update(name.encode("utf-8"))
            content.update(tensor_bytes(tensor))
    return content.hexdigest()


def digest(weights: str, name: str = "") -> str | None:
    """What tells a weights file from another, wherever it lies.

    Args:
        weights: Weights as `create` takes them.
        name: Name of the backbone, whose folder may hold them.

    Returns:
        SHA-256 of the file's content, in hex; None where there is no file of the user's.
    """
    known = backbone_names.parse(name) if backbone_names.is_folder(name) else None
    try:
        path = _file(weights, known)
        if path is None:
            return None
        path = weight_files.find(path)
    except BenchmarkError:
        return None
    content = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            content.update(chunk)
    return content.hexdigest()


def _size(known: backbone_names.BackboneName, image_size: int | None) -> tuple[int, int]:
    return (image_size, image_size) if image_size else known.input_size[1:]


def _file(weights: str, known: backbone_names.BackboneName | None) -> Path | None:
    """The user's file or folder of weights, if there is one."""
    if weights not in NO_FILE:
        return Path(weights).expanduser()
    return known.folder if known and weights == "pretrained" else None
