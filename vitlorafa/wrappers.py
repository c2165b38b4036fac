"""Names of modules and tensors without the modules that wrap a model or parts of it.

`torch.compile`, DDP, DataParallel, FSDP, activation checkpointing and moving averages wrap a module in another one.
Each adds an attribute, such as `_orig_mod` or `module`, to all names. The functions here skip wrappers: modules,
parameters and buffers have the names that they have in the plain model.
"""

import re
from collections.abc import Iterator

from timm.models._features import FeatureDictNet
from torch import Tensor, nn

from vitlorafa.errors import AdapterError

# Attributes in which wrappers hold the wrapped module, their only child.
_HOPS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_FABRIC = "_original_module"  # of Lightning's Fabric, which holds the same model in `_forward_module` too


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside all wrappers; the module itself if it has none.

    Raises:
        AdapterError: If it is no module.
    """
    if not isinstance(module, nn.Module):
        raise AdapterError(f"the model must be a torch.nn.Module, not {type(module).__name__}: create or load it first")
    while (inside := _inside(module)) is not None:
        module = inside
    return module


def plain_name(name: str) -> str:
    """The name of a module or tensor without the wrappers' attributes in it."""
    return ".".join(part for part in name.split(".") if part not in _HOPS)


def named_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules except wrappers, each once, with their names in the plain model.

    Args:
        model: Any module.
        prefix: Name of the module itself.
    """
    yield from _named_modules(model, prefix, set())


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters, each once, with their names in the plain model."""
    seen: set[Tensor] = set()
    for name, module in named_modules(model):
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield join(name, key), parameter


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All buffers of the state dict, each once, with their names in the plain model."""
    seen: set[Tensor] = set()
    for name, module in named_modules(model):
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer not in seen and key not in module._non_persistent_buffers_set:
                seen.add(buffer)
                yield join(name, key), buffer


def join(owner: str, name: str) -> str:
    """The full name of something in a module.

    Args:
        owner: Name of the module; may be empty.
        name: Name within the module.
    """
    return f"{owner}.{name}" if owner else name


def _named_modules(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    module = unwrap(module)
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for key, child in module.named_children():
        # With features_only=True, timm renames "layers.0" to "layers_0".
        key = re.sub(r"_(\d+)$", r".\1", key) if isinstance(module, FeatureDictNet) else key
        yield from _named_modules(child, join(name, key), seen)


def _inside(module: nn.Module) -> nn.Module | None:
    children = module._modules
    hop = next((name for name in _HOPS if children.get(name) is not None), None)
    if hop is None or children.keys() - {hop, _FABRIC}:
        return None
    if hop == "module" and module._parameters:  # a model with parameters of its own
        return None
    return children[hop]
