"""Layers that keep running statistics of their input, as BatchNorm does, and which of them belong to frozen weights."""

from torch import Tensor, nn

_STATISTICS = ("running_mean", "running_var")


def norms(model: nn.Module) -> list[nn.Module]:
    """The layers that keep running statistics."""
    return [module for module in model.modules() if getattr(module, "running_mean", None) is not None]


def frozen(model: nn.Module) -> list[nn.Module]:
    """The norms with frozen weights, and those without weights whose parent module is not all trained."""
    found = norms(model)
    parents = {child: parent for parent in model.modules() for child in parent.children()} if found else {}
    return [norm for norm in found if not _trains(norm, parents.get(norm, norm))]


def moving(model: nn.Module) -> dict[str, Tensor]:
    """The statistics by name that training moves: those of norms that are not frozen."""
    trained = set(norms(model)) - set(frozen(model))
    modules = ((name, module) for name, module in model.named_modules() if module in trained)
    return {f"{name}.{kind}".lstrip("."): getattr(module, kind) for name, module in modules for kind in _STATISTICS}


def _trains(norm: nn.Module, parent: nn.Module) -> bool:
    own = [parameter.requires_grad for parameter in norm.parameters()]
    around = [parameter.requires_grad for parameter in parent.parameters()]
    return any(own) if own else bool(around) and all(around)
