"""The image sizes that a backbone accepts: tried on torch's meta device, where nothing is computed."""

from functools import cache
from typing import Any

import timm
import torch

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models.backbone_names import BackboneName

_STEPS = (4, 7, 8, 14, 16, 28, 32, 48, 64)  # sizes that patches and windows divide are multiples of these


def options(name: BackboneName, size: tuple[int, int]) -> dict[str, Any]:
    """The arguments of `timm.create_model` for an image size, where the model cannot be resized later.

    Args:
        name: Name of the backbone.
        size: Height and width of images.

    Raises:
        BenchmarkError: If the backbone does not accept that size; the message names sizes that it accepts.
    """
    if size == name.input_size[1:]:
        return {}
    made, reason = _try(name.timm, size)
    if reason and not _try(name.timm, name.input_size[1:])[1]:  # else it is the meta device that it does not take
        raise BenchmarkError(
            f"{name.timm} takes no images of {_text(size)} pixels ({reason}): give image_size in --hparams another "
            f"value (it takes {_others(name, size)}), or null for the backbone's own size"
        )
    return made


def resize(model: Any, name: str, size: tuple[int, int]) -> None:
    """Prepares a model for an image size, where it has a method for that.

    Args:
        model: Model of timm's, built for any image size.
        name: Its name, for messages.
        size: Height and width of images.
    """
    if not hasattr(model, "set_input_size"):
        return
    try:
        model.set_input_size(img_size=size)
    except Exception as error:  # assertions, divisions and shapes inside the model
        raise BenchmarkError(
            f"{name} takes no images of {_text(size)} pixels ({_first_line(error)}): give image_size in --hparams "
            "another value, or null for the backbone's own size"
        ) from error


@cache
def _try(name: str, size: tuple[int, int]) -> tuple[dict[str, Any], str]:
    """Builds a backbone for a size and runs it; returns its options, and why it fails (empty if it does not)."""
    made: dict[str, Any] = {}
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
            model: Any = timm.create_model(name, pretrained=False)
            if hasattr(model, "set_input_size"):
                model.set_input_size(img_size=size)
            else:
                try:
                    model = timm.create_model(name, pretrained=False, img_size=size)
                    made = {"img_size": size}
                except TypeError:  # it has no such argument, since it takes any size that is large enough
                    pass
            model.eval()(torch.empty(1, 3, *size))
    except Exception as error:  # assertions, divisions and shapes inside the model
        return made, _first_line(error)
    return made, ""


def _others(name: BackboneName, size: tuple[int, int]) -> str:
    """The nearest smaller and larger sizes that a backbone accepts, and its own."""
    own = name.input_size[1:]
    side = max(size)
    steps = (*_STEPS, own[0] // 2)
    near = [
        next((s for s in sorted(candidates, key=lambda s: abs(s - side)) if not _try(name.timm, (s, s))[1]), None)
        for candidates in (
            {side // step * step for step in steps if side // step} - {side},
            {-(-side // step) * step for step in steps} - {side},
        )
    ]
    sizes = [str(s) for s in near if s is not None and (s, s) != own]
    return ", ".join([*sizes, f"its own {_text(own)}"])


def _text(size: tuple[int, ...]) -> str:
    return " × ".join(map(str, size))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else "its layers do not divide them"
