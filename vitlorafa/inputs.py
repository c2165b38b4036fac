"""Checks of what users pass, where another type would end in an error of Python's own."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError


def check_model(model: Any) -> None:
    """Checks that a model is a module that adapters can be added to.

    Args:
        model: What the user passed.

    Raises:
        AdapterError: If it is no module, is scripted, or has adapters of PEFT.
    """
    if not isinstance(model, nn.Module):
        inside = isinstance(getattr(model, "model", None), nn.Module)
        remedy = "pass its attribute model" if inside else "create the model first, as by timm.create_model(name)"
        raise AdapterError(f"the model must be a torch.nn.Module, not {type(model).__name__}: {remedy}")
    if isinstance(model, torch.jit.ScriptModule):
        raise AdapterError("the model is scripted or traced, so its layers are fixed: adapt it before torch.jit")
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise AdapterError(
            "the model has adapters of PEFT: call its merge_and_unload() or unload() first, or save them with PEFT and "
            "load them by load_adapter"
        )


def check_config(config: Any) -> None:
    """Checks that a configuration is an `AdapterConfig`.

    Args:
        config: What the user passed.

    Raises:
        AdapterError: If it is something else.
    """
    if not isinstance(config, AdapterConfig):
        raise AdapterError(
            f"config must be an AdapterConfig, not {type(config).__name__}: AdapterConfig(...) takes PEFT's names too, "
            "such as r and lora_alpha"
        )


def to_folder(folder: Any) -> Path:
    """The path of a folder.

    Args:
        folder: What the user passed.

    Raises:
        AdapterError: If it is no path.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise AdapterError(
            f"folder must be a path, not {type(folder).__name__}: the model comes first, then the folder"
        )
    return Path(folder).expanduser()
