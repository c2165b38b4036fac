"""How large an adapted model is, and which of its layers are adapted."""

from math import prod

from torch import nn

from vitlorafa.adapted import adapted_models, adapted_state, adapter_layers
from vitlorafa.gaps import describe_gaps
from vitlorafa.heads import find_heads
from vitlorafa.named_adapters import inactive_parameters
from vitlorafa.quantised_weight import quantised_weight
from vitlorafa.wrappers import unwrap


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The number of trainable parameters and the number of all parameters, adapters included.

    Adapters that are not active count among all parameters, as in PEFT. A quantised weight counts as many as it has
    elements, in any format.
    """
    sizes = {parameter: parameter.numel() for parameter in unwrap(model).parameters()}
    for layer in model.modules():
        if (weight := quantised_weight(layer)) is not None:
            stored = [parameter for parameter in layer.parameters(recurse=False) if parameter is not layer.bias]
            sizes |= {**dict.fromkeys(stored, 0), stored[0]: prod(weight.shape)}
    inactive = sum(parameter.numel() for module in model.modules() for parameter in inactive_parameters(module))
    return sum(size for p, size in sizes.items() if p.requires_grad), sum(sizes.values()) + inactive


def get_nb_trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """PEFT's name of `count_parameters`."""
    return count_parameters(model)


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints the number of trainable parameters in the same format as PEFT."""
    trainable, total = count_parameters(model)
    share = 100 * trainable / max(total, 1)
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")


def summary(model: nn.Module) -> str:
    """A table with one line for each adapted layer, and a last line with the total, trainable head included.

    Args:
        model: Adapted model.

    Returns:
        Lines with the columns layer, adapted projections, shape of the weight, rank, trained factors and number of
        trainable parameters. A last line names parts of the model that are not adapted, such as the convolutions of a
        hybrid, if there are some besides embeddings, head, and what the config leaves out.
    """
    rows = [("layer", "adapts", "weight", "rank", "trains", "trainable")]
    for name, layer in adapter_layers(model):
        factors = {"B": layer.lora_B, "A": layer.lora_A}
        rows.append(
            (
                name,
                ", ".join(layer.projections),
                f"{layer.out_features} × {layer.in_features}",
                str(layer.lora_A.shape[1]),
                "".join(key for key, factor in factors.items() if factor.requires_grad) or "-",
                f"{sum(factor.numel() for factor in factors.values() if factor.requires_grad):,}",
            )
        )
    trainable, total = count_parameters(model)
    rows.append(("model", "", "", "", "", f"{trainable:,} of {total:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for inner in adapted_models(model) if len(rows) > 2 else ():
        lines.append(describe_gaps(inner, adapted_state(inner).config, find_heads(inner)))
    return "\n".join(filter(None, lines))
