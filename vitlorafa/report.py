"""What an adapted model consists of, in words."""

from torch import nn

from vitlorafa.inject import adapter_layers


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The number of trainable parameters and of all parameters, adapters included."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints how many parameters train, in PEFT's words."""
    trainable, total = count_parameters(model)
    share = 100 * trainable / max(total, 1)
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")


def summary(model: nn.Module) -> str:
    """A table of the adapted layers, a line each, and the total with a trainable head.

    Returns:
        Lines of: layer, adapted projections, the weight's shape, rank, trained factors, trainable parameters.
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
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
