"""The transformer blocks of a backbone, and what they compute."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from domainbed_ext.errors import BenchmarkError
from vitlorafa import linear_sites


def transformer_blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks with an attention and an MLP, in the model's order, whatever the family and with adapters or without.

    Args:
        backbone: Timm model.

    Raises:
        BenchmarkError: It has none.
    """
    modules = dict(backbone.named_modules())
    blocks = [modules[name] for name in dict.fromkeys(site.block for site in linear_sites(backbone))]
    if not blocks:
        raise BenchmarkError(f"this {type(backbone).__name__} has no transformer blocks: choose another --backbone")
    return blocks


@contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The context in which a list is filled: with the input of the first block, and the output of every block.

    Args:
        blocks: Blocks in the order in which they run.
    """
    tensors: list[Tensor] = []
    handles = [blocks[0].register_forward_pre_hook(lambda _, inputs: tensors.append(inputs[0]))]
    handles += [block.register_forward_hook(lambda _, inputs, output: tensors.append(output)) for block in blocks]
    try:
        yield tensors
    finally:
        for handle in handles:
            handle.remove()
