"""Partial tuning: a part of the pretrained parameters trains, and the head. Nothing is added to the model."""

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.errors import BenchmarkError
from vitlorafa import head_parameters, transformer_blocks

T = TypeVar("T")


class PartialTuning(Algorithm):
    """Some of the backbone's parameters train, which a subclass chooses, and the head."""

    def prepare(self, backbone: nn.Module, hparams: dict[str, Any]) -> None:
        """Freezes everything but the chosen parameters and the head."""
        chosen = set(self.chosen(backbone, hparams))
        for parameter in backbone.parameters():
            parameter.requires_grad_(parameter in chosen)
        for parameter in head_parameters(backbone).values():
            parameter.requires_grad_(True)

    def chosen(self, backbone: nn.Module, hparams: dict[str, Any]) -> Iterator[nn.Parameter]:
        """Yields the parameters that train besides the head.

        Args:
            backbone: Timm model with a new head.
            hparams: Hyperparameters of the run.

        Raises:
            BenchmarkError: The backbone has none.
        """
        raise TypeError(f"{type(self).__name__} has no method chosen, which names what trains")


class BitFit(PartialTuning):
    """BitFit (Ben Zaken et al. 2022): all biases train, those of normalisation layers included, and the head."""

    def chosen(self, backbone: nn.Module, hparams: dict[str, Any]) -> Iterator[nn.Parameter]:
        """Yields the biases; BEiT's are named `q_bias` and `v_bias`."""
        biases = [parameter for name, parameter in backbone.named_parameters() if name.endswith("bias")]
        yield from _some(biases, self, hparams, "biases")


class NormTuning(PartialTuning):
    """Tuning of normalisation layers (Qi et al. 2022): their scales and shifts train, and the head."""

    def chosen(self, backbone: nn.Module, hparams: dict[str, Any]) -> Iterator[nn.Parameter]:
        """Yields scales and shifts of LayerNorm, RMSNorm, GroupNorm and BatchNorm."""
        norms = [module for module in backbone.modules() if _is_norm(module)]
        parameters = [parameter for norm in norms for parameter in norm.parameters(recurse=False)]
        yield from _some(parameters, self, hparams, "normalisation layers with parameters")


class LastBlocks(PartialTuning):
    """Partial fine-tuning (Yosinski et al. 2014): the last n blocks and what follows them train.

    This is the final norm and the head, in hierarchical models also a downsampling layer between two of the blocks.
    Nothing before these blocks has a gradient, so nothing before them is kept for backward.
    """

    def chosen(self, backbone: nn.Module, hparams: dict[str, Any]) -> Iterator[nn.Parameter]:
        """Yields the parameters of the last n blocks, and all that the model lists after the first of these."""
        names = _some([name for name, _ in transformer_blocks(backbone)], self, hparams, "transformer blocks")
        n = hparams["n"]
        if not isinstance(n, int) or not 1 <= n <= len(names):
            raise BenchmarkError(
                f"{type(self).__name__}: n {n!r} should be a whole number from 1 to {len(names)}, the number of blocks "
                f"of {hparams['backbone']}"
            )
        reached = False
        for name, parameter in backbone.named_parameters():
            reached = reached or name.startswith(f"{names[-n]}.")
            if reached:
                yield parameter


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._NormBase)) or hasattr(module, "normalized_shape")


def _some(found: list[T], method: Algorithm, hparams: dict[str, Any], what: str) -> list[T]:
    if not found:
        raise BenchmarkError(f"{type(method).__name__}: {hparams['backbone']} has no {what}: choose another backbone")
    return found
