"""The head of a backbone: its classifier, or classifiers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_ext.errors import BenchmarkError
from vitlorafa import classifiers


def tensors(backbone: nn.Module) -> set[Tensor]:
    """The parameters and buffers of the head.

    Args:
        backbone: Timm model, with adapters or without.
    """
    return {tensor for each in classifiers(backbone) for tensor in (*each.parameters(), *each.buffers())}


@torch.no_grad()
def set_to_zero(backbone: nn.Module) -> None:
    """Sets weights and biases of the head to zero, so that all logits are.

    Args:
        backbone: Timm model with a new head.
    """
    for classifier in classifiers(backbone):
        for parameter in classifier.parameters():
            parameter.zero_()


def find_linear(backbone: nn.Module, hparams: Mapping[str, Any]) -> nn.Linear:
    """Finds the linear layer that is the whole head, the one that trains if PEFT has copied it.

    Args:
        backbone: Timm model, with adapters or without.
        hparams: Hyperparameters of the run.

    Raises:
        BenchmarkError: The head is another one.
    """
    found = classifiers(backbone)
    copied = getattr(found[0], "modules_to_save", None) if len(found) == 1 else None
    layers = list(copied.values()) if copied is not None else found
    if len(layers) == 1 and isinstance(layers[0], nn.Linear):
        return layers[0]
    reason = f"has {len(found)} heads" if len(found) != 1 else f"has a {type(found[0]).__name__} for a head"
    raise BenchmarkError(
        f"head_start=probe on {hparams['backbone']}: a probe is one linear layer, and this backbone {reason}: choose "
        "another --backbone or head_start"
    )
