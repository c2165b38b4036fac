"""LoRA, LoRA-Pro, LoRA-FA and LoRA-FB: which factors of each adapter train, and on which gradients."""

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from domainbed_ext.algorithms.base import OUTSIDE, TRAINED, Algorithm, write_trained
from domainbed_ext.errors import BenchmarkError
from vitlorafa import (
    AdapterConfig,
    AdapterError,
    adapter_layers,
    correct_gradients,
    inject,
    load_adapter,
    parameter_groups,
    quantise,
    save_adapter,
    set_strength,
)

_FACTORS = ("lora_A", "lora_B")
_LATER = ("init_A", "init_B", "rank_stabilised", "blocks")  # not in the records of earlier versions


class BA(Algorithm):
    """LoRA (Hu et al. 2021): both factors train."""

    TRAIN: ClassVar[Literal["B", "A", "BA"]] = "BA"

    def prepare(self, backbone: nn.Module, hparams: dict[str, Any]) -> None:
        """Adds the adapters, and quantises the frozen weights if `quantise`. Factors and head train."""
        try:
            config = AdapterConfig(
                rank=hparams["rank"],
                alpha=hparams["alpha"],
                train=self.TRAIN,
                targets=hparams["targets"],
                dropout=hparams["adapter_dropout"],
                compute=hparams["compute"],
                gradient_correction=self.corrects_gradients(hparams),
                seed=hparams.get("adapter_seed"),
                **{name: hparams[name] for name in _LATER if name in hparams},
            )
            inject(backbone, config, train_head=True)
            if hparams.get("quantise") is not None:
                quantise(backbone, hparams["quantise"])
        except AdapterError as error:
            raise BenchmarkError(f"{type(self).__name__} on {hparams['backbone']}: {error}") from error

    def corrects_gradients(self, hparams: dict[str, Any]) -> bool:
        """Whether steps use corrected gradients (LoRA-FA, theorems 4.1 and A.1; LoRA-Pro)."""
        return bool(hparams.get("gradient_correction", False))  # BA has none

    def make_optimizer(self, parameters: list[nn.Parameter], hparams: dict[str, Any]) -> torch.optim.Optimizer:
        """AdamW; `gradient_correction` corrects its gradients, and `lr_B_ratio` gives B another rate (LoRA+)."""
        ratio = hparams.get("lr_B_ratio", 1.0)
        groups: Any = parameters
        try:
            if ratio != 1:
                groups = parameter_groups(self.backbone, lr=hparams["lr"], lr_B_ratio=ratio, parameters=parameters)
            optimizer = super().make_optimizer(groups, hparams)
            if self.corrects_gradients(hparams):
                correct_gradients(optimizer, self.backbone)
        except AdapterError as error:
            raise BenchmarkError(f"{type(self).__name__}: {error}") from error
        return optimizer

    def weights(self) -> dict[str, Tensor]:
        """The updates s·B·A, and what else of the backbone trains."""
        others = {name: weight for name, weight in super().weights().items() if self.is_changed_itself(name)}
        return others | {f"{name}.weight": layer.delta_weight() for name, layer in adapter_layers(self.backbone)}

    def set_strength(self, strength: float) -> None:
        """Scales the updates s·B·A, and what else training changed as all methods do."""
        super().set_strength(strength)
        set_strength(self.backbone, strength)

    def is_changed_itself(self, name: str) -> bool:
        """Returns whether a tensor is no factor of an adapter."""
        layer, _, attribute = name.rpartition(".")
        return attribute not in _FACTORS or layer not in dict(adapter_layers(self.backbone))

    def save(self, folder: Path) -> None:
        """Saves adapter and head in vitlorafa's format, and tensors outside of the backbone in a second file."""
        outside = {name: tensor for name, tensor in self.trained().items() if name.startswith(OUTSIDE)}
        try:
            save_adapter(self.backbone, folder, head=True, format="vitlorafa")
        except AdapterError as error:
            raise error.__cause__ if isinstance(error.__cause__, OSError) else error from None
        if outside:
            write_trained(folder, outside, self.backbone)

    def load(self, folder: Path) -> None:
        """Loads what `save` wrote."""
        self._strength.check_full("loading")
        load_adapter(self.backbone, folder)
        if (folder / TRAINED).exists():
            self.load_trained(folder / TRAINED, lambda name: name.startswith(OUTSIDE))


class LoRAPro(BA):
    """LoRA-Pro (Wang et al. 2024): both factors train, on gradients as close as possible to full fine-tuning's."""

    def corrects_gradients(self, hparams: dict[str, Any]) -> bool:
        """Always."""
        return True


class BOnly(BA):
    """LoRA-FA, B̂A_rand in Zhu et al. (2024): A is frozen and random orthonormal, B trains."""

    TRAIN = "B"


class AOnly(BA):
    """LoRA-FB, B_randÂ in Zhu et al. (2024): B is frozen and random orthonormal, A trains."""

    TRAIN = "A"
