"""What training changes in an adapted model, by the names within the timm model: what is saved of it."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from vitlorafa.inject import (
    adapter_layers,
    changed_buffers,
    classifiers,
    head_buffers,
    head_parameters,
    outside_parameters,
)
from vitlorafa.wrappers import join, named_buffers, named_parameters

OUTSIDE = "outside:"  # begins the names of what is not in the timm model, but in the module that holds it


def factors(model: nn.Module) -> dict[str, Tensor]:
    """The factors of all adapted layers."""
    return {
        f"{name}.{factor}": getattr(layer, factor)
        for name, layer in adapter_layers(model)
        for factor in ("lora_A", "lora_B")
    }


def has_head(model: nn.Module) -> bool:
    """Whether there is a classifier with parameters."""
    return any(True for head in classifiers(model) for _ in head.parameters())


def head(model: nn.Module) -> dict[str, Tensor]:
    """The classifier's parameters and buffers.

    Raises:
        AdapterError: If the model has no classifier.
    """
    return {**head_parameters(model), **head_buffers(model)}


def places(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a state dict."""
    return {**dict(named_parameters(model)), **dict(named_buffers(model))}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The same, but the weights of merged layers as they are without the update."""
    weights = {join(name, "base.weight"): layer.pretrained_weight for name, layer in adapter_layers(model)}
    return places(model) | weights


def extra(model: nn.Module) -> dict[str, Tensor]:
    """What else trained: parameters that require a gradient, and buffers that are not as before `inject`."""
    others = factors(model).keys() | (head(model).keys() if has_head(model) else ())
    names = [name for name, parameter in named_parameters(model) if parameter.requires_grad]
    names += changed_buffers(model)
    everything = tensors(model)
    return {name: everything[name] for name in names if name not in others}


def outside(root: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """What trains in the module around the timm model, and the buffers there if anything does, by names in the file."""
    trains = any(parameter.requires_grad for parameter in outside_parameters(root, model).values())
    return {name: tensor for name, tensor in around(root, model).items() if trains and _trains(tensor)}


def around(root: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of the module around the timm model, by names in the file."""
    inside = set(model.buffers())
    buffers = {name: buffer for name, buffer in named_buffers(root) if buffer not in inside}
    return {OUTSIDE + name: tensor for name, tensor in {**outside_parameters(root, model), **buffers}.items()}


def whole_modules(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """All tensors of the modules that some tensors belong to, submodules left out."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    everything = tensors(model)
    return {name: tensor for name, tensor in everything.items() if name.rpartition(".")[0] in owners}


def copy_to_cpu(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory, as safetensors wants them."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in values.items()}


def _trains(tensor: Tensor) -> bool:
    return tensor.requires_grad or not isinstance(tensor, nn.Parameter)
