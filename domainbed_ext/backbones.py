"""A timm model, its weights and its own input statistics."""

import hashlib
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg, is_model, list_models
from torch import Tensor, nn

import domainbed_ext.tiny_vit  # noqa: F401  (registers the embedded backbone with timm)
from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.inputs import IMAGENET_MEAN, IMAGENET_STD, Inputs
from domainbed_ext.protocols import CHOICES

INPUT_STATS = CHOICES["input_stats"]
NO_FILE = ("pretrained", "none")  # what weights may be that are no file of the user's


def check_name(name: str) -> None:
    """Checks that timm knows a model.

    Args:
        name: as timm has it, with or without a tag, e.g. "vit_base_patch16_224.augreg_in21k".

    Raises:
        BenchmarkError: it does not; names the nearest one it does.
    """
    architecture = name.split(".")[0]
    if not is_model(architecture):
        raise unknown("backbone", architecture, list_models())
    tagged = list_models(f"{architecture}.*", pretrained=True)
    if "." in name and name not in tagged:
        raise unknown("backbone", name, tagged)


def inputs(name: str, image_size: int | None = None, stats: str = "backbone") -> Inputs:
    """What a backbone wants to be fed.

    Args:
        name: of the timm model.
        image_size: pixels a side, in place of the backbone's own.
        stats: "backbone" normalises with the statistics the backbone was trained with; "imagenet" with
            ImageNet's whatever the backbone, as DomainBed does.

    Returns:
        Size, mean and standard deviation.
    """
    check_name(name)
    config = get_pretrained_cfg(name, allow_unregistered=True)
    _, height, width = config.input_size if config else (3, 224, 224)
    size = (image_size, image_size) if image_size else (height, width)
    if stats == "imagenet" or config is None:
        return Inputs(size, IMAGENET_MEAN, IMAGENET_STD)
    return Inputs(size, tuple(config.mean), tuple(config.std))


def create(name: str, weights: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """Builds a backbone with a fresh head.

    Args:
        name: of the timm model.
        weights: "pretrained" (timm's own way: from the hub, or from the package for the embedded one), "none"
            (random), or a `.safetensors` file with timm's key names; its head is not used.
        num_classes: of the head, which is drawn from torch's global generator.
        image_size: pixels a side; position embeddings are resampled if it is not the backbone's own.

    Returns:
        The model; logits are [batch, num_classes].

    Raises:
        BenchmarkError: unknown name, weights that cannot be had, or that do not fit the model.
    """
    check_name(name)
    try:
        model: Any = timm.create_model(name, pretrained=weights == "pretrained")
    except Exception as error:  # hub clients raise many kinds: no network, no such file, no permission
        if weights != "pretrained":
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BenchmarkError(
            f"could not get the weights of {name} ({reason}): check the network, or add --weights FILE.safetensors"
        ) from error
    if weights not in NO_FILE:
        _load(model, name, Path(weights).expanduser())
    model.reset_classifier(num_classes)
    if image_size and image_size != inputs(name).size[0]:
        model.set_input_size(img_size=image_size)
    return model


def digest(weights: str) -> str | None:
    """What tells a weights file from another, wherever it lies.

    Args:
        weights: as `create` takes it.

    Returns:
        SHA-256 of the file's content, in hex; None where there is no file of the user's.
    """
    path = Path(weights).expanduser()
    if weights in NO_FILE or not path.is_file():
        return None
    content = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            content.update(chunk)
    return content.hexdigest()


def _load(model: Any, name: str, path: Path) -> None:
    """Loads a file strictly, but for the head."""
    if not path.is_file():
        raise BenchmarkError(
            f"no weights file {path}: give --weights a .safetensors file, or leave it out for timm's own"
        )
    if path.suffix != ".safetensors":
        raise BenchmarkError(
            f"{path} is not a .safetensors file: convert it (pickled weights can run code, so are not read)"
        )
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BenchmarkError(f"{path} is not a whole .safetensors file ({error}): get it again") from error
    head = _head_names(model)
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith(head)}
    found = {key: value for key, value in found.items() if not key.startswith(head)}
    misfits = _misfits(wanted, found)
    if misfits:
        listed = "; ".join(misfits[:3]) + (f"; and {len(misfits) - 3} more" if len(misfits) > 3 else "")
        raise BenchmarkError(
            f"{path} does not fit {name}: {listed}; give the file of that architecture, or its --backbone"
        )
    model.load_state_dict(found, strict=False)


def _head_names(model: Any) -> tuple[str, ...]:
    """How timm's names of the classifier's tensors begin, e.g. ("head.",)."""
    classifier = model.pretrained_cfg.get("classifier", "head") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return tuple(f"{name}." for name in names)


def _misfits(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    shapes = [
        f"{key} is {list(found[key].shape)} instead of {list(wanted[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    missing = [f"{key} is missing" for key in wanted if key not in found]
    unexpected = [f"{key} is not in the model" for key in found if key not in wanted]
    return shapes + missing + unexpected
