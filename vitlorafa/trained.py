"""What training changes in an adapted model, and therefore what is saved; by names within the timm model."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from vitlorafa.adapted import (
    adapter_layers,
    changed_buffers,
    classifiers,
    head_buffers,
    head_parameters,
    outside_parameters,
)
from vitlorafa.wrappers import join, named_buffers, named_parameters

OUTSIDE = "outside:"  # prefix of names that are not in the timm model, but in the module that holds it


def factors(model: nn.Module) -> dict[str, Tensor]:
    """The factors A and B of all adapted layers, with their start where the update did not start at zero."""
    return {
        f"{name}.{factor}": getattr(layer, factor)
        for name, layer in adapter_layers(model)
        for factor in ("lora_A", "lora_B", "start_A", "start_B")
        if getattr(layer, factor) is not None
    }


def has_head(model: nn.Module) -> bool:
    """Whether there is a classifier with parameters."""
    return any(True for head in classifiers(model) for _ in head.parameters())


def head_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The classifier's parameters and buffers.

    Raises:
        AdapterError: If the model has no classifier.
    """
    return {**head_parameters(model), **head_buffers(model)}


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that belong to a state dict."""
    return {**dict(named_parameters(model)), **dict(named_buffers(model))}


def unmerged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The same as `state_tensors`, but with the pretrained weights of merged layers."""
    layers = {join(name, "base.weight"): layer for name, layer in adapter_layers(model) if layer.merged}
    tensors = state_tensors(model)
    return tensors | {name: layer.pretrained_weight for name, layer in layers.items() if name in tensors}


def extra_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters besides factors and head, and buffers that changed since `inject`."""
    saved_apart = factors(model).keys() | (head_tensors(model).keys() if has_head(model) else ())
    names = [name for name, parameter in named_parameters(model) if parameter.requires_grad]
    names += changed_buffers(model)
    tensors = unmerged_tensors(model)
    return {name: tensors[name] for name in names if name not in saved_apart}


def trained_outside(root: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters of the module around the timm model, with that module's buffers; nothing if none trains.

    Args:
        root: Module that holds the timm model.
        model: The timm model.

    Returns:
        Tensors by their names in the file.
    """
    trains = any(parameter.requires_grad for parameter in outside_parameters(root, model).values())
    return {name: tensor for name, tensor in tensors_outside(root, model).items() if trains and _trains(tensor)}


def tensors_outside(root: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of the module around the timm model.

    Args:
        root: Module that holds the timm model.
        model: The timm model.

    Returns:
        Tensors by their names in the file.
    """
    inside = set(model.buffers())
    buffers = {name: buffer for name, buffer in named_buffers(root) if buffer not in inside}
    return {OUTSIDE + name: tensor for name, tensor in {**outside_parameters(root, model), **buffers}.items()}


def complete_modules(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """All tensors of the modules that own the named tensors, without submodules.

    Args:
        model: Adapted model.
        names: Names of tensors.
    """
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    tensors = unmerged_tensors(model)
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in owners}


def copy_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU that share no memory, as safetensors requires.

    Args:
        tensors: Tensors by name.
    """
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _trains(tensor: Tensor) -> bool:
    return tensor.requires_grad or not isinstance(tensor, nn.Parameter)
