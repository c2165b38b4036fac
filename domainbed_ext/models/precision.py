"""In which number format the products of a run are computed."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from vitlorafa.inject import adapter_layers
from vitlorafa.layers import FastLinear
from vitlorafa.ops import autocast_dtype
from vitlorafa.ops.processor import cpu_has

PRECISIONS = ("auto", "bf16", "float32")


def resolve(precision: str, device: torch.device) -> str:
    """What "auto" means here: bf16 where the processor multiplies it natively, else float32.

    A CPU without AVX512-BF16 or AMX emulates bf16 more slowly than it computes float32.

    Args:
        precision: one of `PRECISIONS`.
        device: where the run computes.

    Returns:
        "bf16" or "float32".
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bf16" if _cpu_has_bf16() else "float32"


def _cpu_has_bf16() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities:
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return cpu_has("avx512_bf16")  # torch 2.6 and before have no public word


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which a model computes.

    Args:
        precision: "bf16" or "float32".
        device: where.

    Returns:
        torch's autocast, switched off for float32.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def hold(model: nn.Module, precision: str) -> None:
    """Rounds frozen weights once to what autocast would round them to at every step; the products are the same.

    Weights under an adapter stay as they are, for W + s B A is formed in float32 and rounded once. Outside autocast,
    e.g. in a method's own update, a module computes in its input's format with the rounded weights.

    Args:
        model: on any device, adapted or not.
        precision: "bf16" or "float32", which changes nothing.
    """
    if precision != "bf16":
        return
    adapted = {layer.base for _, layer in adapter_layers(model)}
    for module in model.modules():
        if type(module) in _HELD and module not in adapted:
            frozen = [parameter for parameter in module.parameters(recurse=False) if not parameter.requires_grad]
            for parameter in frozen:
                parameter.data = parameter.data.to(torch.bfloat16)
            if frozen:
                module.__class__ = _HELD[type(module)]


class HeldConv2d(nn.Conv2d):
    """A convolution, of whose weight and bias either may be in another format than its input."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_channels, height, width] → [batch, out_channels, ...], in autocast's format or the input's."""
        return self._conv_forward(x, _fitting(self.weight, x), _fitting(self.bias, x))


def _fitting(parameter: Any, x: Tensor) -> Any:
    """A parameter, or None, in the format of x, unless autocast will see to both."""
    return parameter if parameter is None or autocast_dtype(x) else parameter.to(x.dtype)


_HELD: dict[type, type] = {nn.Linear: FastLinear, nn.Conv2d: HeldConv2d}
