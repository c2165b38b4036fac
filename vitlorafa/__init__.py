"""LoRA with one factor frozen, for timm vision transformers.

model = timm.create_model("vit_small_patch16_224", pretrained=True, num_classes=7)
vitlorafa.inject(model, vitlorafa.AdapterConfig(rank=8, train="B", targets="all"), train_head=True)
train(model)  # as any other: AdamW over the parameters that require a gradient
vitlorafa.save_adapter(model, "adapter", head=True)
vitlorafa.merge_and_unload(model)  # a plain timm model again
"""

from vitlorafa.commands import refuse_what_is_none
from vitlorafa.config import TARGETS, TRAIN, AdapterConfig
from vitlorafa.errors import AdapterError, AdapterWarning
from vitlorafa.init import INITS
from vitlorafa.inject import (
    adapter_layers,
    disable_adapter,
    inject,
    merge,
    merge_and_unload,
    remove,
    unmerge,
)
from vitlorafa.io import load_adapter, save_adapter
from vitlorafa.layers import LoRALinear
from vitlorafa.matrices import matrices
from vitlorafa.ops import lora_linear
from vitlorafa.optim import correct_gradients
from vitlorafa.report import count_parameters, print_trainable_parameters, summary
from vitlorafa.speed_up import speed_up

__version__ = "0.1.0"

__all__ = [
    "INITS",
    "TARGETS",
    "TRAIN",
    "AdapterConfig",
    "AdapterError",
    "AdapterWarning",
    "LoRALinear",
    "adapter_layers",
    "correct_gradients",
    "count_parameters",
    "disable_adapter",
    "inject",
    "load_adapter",
    "lora_linear",
    "matrices",
    "merge",
    "merge_and_unload",
    "print_trainable_parameters",
    "remove",
    "save_adapter",
    "speed_up",
    "summary",
    "unmerge",
]

refuse_what_is_none()
