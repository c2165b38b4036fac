"""`Peft@method=NAME`: a method of the package peft on the backbone. `peft_methods` declares them.

The layers of the timm model are replaced in place, as `peft.get_peft_model` does, and the timm model stays what is
called. What a method needs beyond that is in `peft_adaptations`.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_ext.algorithms.base import OUTSIDE, TRAINED, Algorithm, write_trained
from domainbed_ext.algorithms.forward import Forward
from domainbed_ext.algorithms.peft_adaptations import ADAPTATIONS, Adaptation, weight_and_bias
from domainbed_ext.algorithms.peft_methods import SELECTOR
from domainbed_ext.data.loader import Minibatch
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.objectives.base import Batch
from vitlorafa import AdapterError


class Peft(Algorithm):
    """One of PEFT's methods; the head trains beside it.

    Attributes:
        adaptation: The backbone as PEFT adapted it. Checkpoints hold its `state_dict`.
    """

    adaptation: Adaptation

    def prepare(self, backbone: nn.Module, hparams: dict[str, Any]) -> None:
        """Adapts the backbone by PEFT."""
        name = hparams[SELECTOR]
        try:
            self.adaptation = ADAPTATIONS.get(name, Adaptation)(backbone, name, hparams)
        except AdapterError as error:
            raise BenchmarkError(f"Peft@{SELECTOR}={name} on {hparams['backbone']}: {error}") from error

    def make_optimizer(self, parameters: list[nn.Parameter], hparams: dict[str, Any]) -> torch.optim.Optimizer:
        """Makes PEFT's optimizer of the method, where it has one, else AdamW."""
        return self.adaptation.make_optimizer(hparams) or super().make_optimizer(parameters, hparams)

    def begin(self, steps: int, minibatches: Callable[[int], Iterable[list[Minibatch]]]) -> None:
        """Lets the method use the number of steps, and the cross-entropy of the first minibatches."""

        def losses(count: int) -> Iterator[Tensor]:
            for part in (part for each in minibatches(count) for part in self.parts(each)):
                batch = Batch.of(part, self.device)
                yield self.objective.cross_entropy(Forward(self).logits(batch.images), batch.labels)

        self.adaptation.begin(steps, losses)

    def penalty(self) -> Tensor | None:
        """Computes the method's own term of the loss."""
        return self.adaptation.penalty()

    def after_step(self) -> None:
        """Lets the method change what it adapts, as AdaLoRA does."""
        self.adaptation.after_step()

    def weights(self) -> dict[str, Tensor]:
        """The weights and biases that adapted layers compute with, and what else of the backbone trains."""
        weights = {name: weight for name, weight in super().weights().items() if self.is_changed_itself(name)}
        for name, layer in self.adaptation.adapted():
            weights[f"{name}.weight"], bias = weight_and_bias(layer)
            if layer.get_base_layer().bias is not None:
                weights[f"{name}.bias"] = bias
        return weights

    def set_strength(self, strength: float) -> None:
        """Lets adapted layers compute with W + strength · (W' − W), whatever the method makes of W; the rest as all."""
        super().set_strength(strength)
        self.adaptation.set_strength(strength)

    def is_changed_itself(self, name: str) -> bool:
        """Returns whether a tensor is in no adapted layer."""
        return not name.startswith(tuple(f"{layer}." for layer in self.adaptation.layers))

    def training_state(self) -> dict[str, Any]:
        """The same as that of all methods, with a tensor that several layers share, as VeRA's projections, once."""
        state = super().training_state()
        first: dict[int, str] = {}
        for name, tensor in state["tensors"].items():
            first.setdefault(tensor.data_ptr(), name)
        tensors = {
            name: tensor
            for name, tensor in state["tensors"].items()
            if first[tensor.data_ptr()] == name or not tensor.numel()
        }
        return {**state, "tensors": tensors}

    def save(self, folder: Path) -> None:
        """Saves adapter and head in PEFT's format, and what else changed in a second file."""
        others = {name: tensor for name, tensor in self.trained().items() if self._is_apart(name)}
        self.adaptation.save(folder)
        if others:
            write_trained(folder, others, self.backbone)

    def load(self, folder: Path) -> None:
        """Loads what `save` wrote."""
        self._strength.check_full("loading")
        self.adaptation.load(folder)
        if (folder / TRAINED).exists():
            self.load_trained(folder / TRAINED, self._is_apart)

    def _is_apart(self, name: str) -> bool:
        """Whether PEFT's file lacks it: what is outside of the backbone, or a buffer of the backbone's own."""
        return name.startswith(OUTSIDE) or self.adaptation.untouched(name.rpartition(".")[0])
