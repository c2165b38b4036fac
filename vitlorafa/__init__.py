"""LoRA adapters for timm vision transformers: train both factors (LoRA), only B (LoRA-FA) or only A (LoRA-FB).

model = timm.create_model("vit_small_patch16_224", pretrained=True, num_classes=7)
vitlorafa.inject(model, vitlorafa.AdapterConfig(rank=8, train="B", targets="all"), train_head=True)
train(model)  # your training loop: AdamW over the parameters that require a gradient
vitlorafa.save_adapter(model, "adapter", head=True)
vitlorafa.merge_and_unload(model)  # a plain timm model again
"""

from vitlorafa import tuning
from vitlorafa.adapted import adapter_layers, classifiers, head_parameters
from vitlorafa.average import Average, average
from vitlorafa.cast_frozen import cast_frozen
from vitlorafa.commands import refuse_other_modules
from vitlorafa.config import TARGETS, TRAIN, AdapterConfig
from vitlorafa.errors import AdapterError, AdapterWarning
from vitlorafa.evaluation_batch import fastest_evaluation_batch
from vitlorafa.hub import from_pretrained, push_to_hub, save_with_card
from vitlorafa.init import INITS
from vitlorafa.inject import disable_adapter, inject, merge, merge_and_unload, remove, unmerge
from vitlorafa.io import load_adapter, save_adapter
from vitlorafa.keep_freed_memory import keep_freed_memory
from vitlorafa.layers import LoRALinear
from vitlorafa.machine import instruction_limits
from vitlorafa.matrices import matrices
from vitlorafa.model_card import ModelCard
from vitlorafa.named_adapters import active_adapter, add_adapter, delete_adapter, list_adapters, set_adapter
from vitlorafa.ops import lora_linear
from vitlorafa.ops.processor import cpu_has, fastest_precision
from vitlorafa.optim import correct_gradients, parameter_groups
from vitlorafa.origin import describe_model
from vitlorafa.quantise import quantise
from vitlorafa.quantised_linear import QuantisedLinear, dequantise
from vitlorafa.sites import Site, in_blocks, linear_sites, transformer_blocks
from vitlorafa.speed_up import speed_up
from vitlorafa.stack import choose_adapter, stack
from vitlorafa.strength import set_strength
from vitlorafa.summary import count_parameters, get_nb_trainable_parameters, print_trainable_parameters, summary
from vitlorafa.tensor_bytes import tensor_bytes
from vitlorafa.trained import copy_to_cpu
from vitlorafa.tuning import use_ways

__version__ = "0.1.0"

__all__ = [
    "INITS",
    "TARGETS",
    "TRAIN",
    "AdapterConfig",
    "AdapterError",
    "AdapterWarning",
    "Average",
    "LoRALinear",
    "ModelCard",
    "QuantisedLinear",
    "Site",
    "active_adapter",
    "adapter_layers",
    "add_adapter",
    "average",
    "cast_frozen",
    "choose_adapter",
    "classifiers",
    "copy_to_cpu",
    "correct_gradients",
    "count_parameters",
    "cpu_has",
    "delete_adapter",
    "dequantise",
    "describe_model",
    "disable_adapter",
    "fastest_evaluation_batch",
    "fastest_precision",
    "from_pretrained",
    "get_nb_trainable_parameters",
    "head_parameters",
    "in_blocks",
    "inject",
    "instruction_limits",
    "keep_freed_memory",
    "linear_sites",
    "list_adapters",
    "load_adapter",
    "lora_linear",
    "matrices",
    "merge",
    "merge_and_unload",
    "parameter_groups",
    "print_trainable_parameters",
    "push_to_hub",
    "quantise",
    "remove",
    "save_adapter",
    "save_with_card",
    "set_adapter",
    "set_strength",
    "speed_up",
    "stack",
    "summary",
    "tensor_bytes",
    "transformer_blocks",
    "tuning",
    "unmerge",
    "use_ways",
]

refuse_other_modules()
