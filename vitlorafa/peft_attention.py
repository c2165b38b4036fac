"""PEFT's way to adapt an `nn.MultiheadAttention`: one LoRA of the packed q, k and v, and one of the output projection.

PEFT adapts both or neither, and its versions so far add the update of the output projection twice
(https://github.com/huggingface/peft/pull/3774). So only adapters of q, k and v are exchanged with PEFT: the factors of
the output projection are zeros in its files.
"""

from collections.abc import Collection

from torch import Tensor, nn

from vitlorafa.errors import AdapterError
from vitlorafa.packed_attention import INPUT, OUTPUT, UnpackedAttention
from vitlorafa.wrappers import join, named_modules

Pair = tuple[Tensor, Tensor]  # A [R, d_in] and B [d_out, R] of a layer
_OUTPUT = f".base_layer.{OUTPUT}"  # PEFT's name of the output projection within an adapted attention


def obstacle(model: nn.Module, layers: Collection[str]) -> str:
    """Why PEFT's adapters of attentions would not do the same and what to do, as a sentence; empty if they do.

    Args:
        model: Adapted model.
        layers: Names of the adapted layers.
    """
    for name, module in named_modules(model):
        inside = [layer for layer in layers if layer.startswith(join(name, ""))]
        if isinstance(module, nn.TransformerEncoderLayer) and inside:
            return (
                f"PEFT has no effect on {inside[0]} in evaluation, where nn.TransformerEncoderLayer reads the weights "
                "of its layers without calling them: save with format='vitlorafa'"
            )
        if isinstance(module, UnpackedAttention) and join(name, OUTPUT) in layers:
            return (
                f"PEFT adds the update of {join(name, OUTPUT)} twice: leave proj out of the targets, or save with "
                "format='vitlorafa'"
            )
    return ""


def to_peft(model: nn.Module, pairs: dict[str, Pair]) -> dict[str, Pair]:
    """The factors by PEFT's names.

    Args:
        model: Adapted model without an `obstacle`.
        pairs: Factors by layer.
    """
    renamed = dict(pairs)
    for name, module in named_modules(model):
        if isinstance(module, UnpackedAttention):
            A, B = renamed.pop(join(name, INPUT))
            d = module.embed_dim
            renamed |= {name: (A, B), name + _OUTPUT: (A.new_zeros(len(A), d), B.new_zeros(d, len(A)))}
    return renamed


def from_peft(pairs: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The factors by the names of layers here.

    Args:
        pairs: Factors "A" and "B" by PEFT's name of the layer.

    Raises:
        AdapterError: If an output projection is adapted too.
    """
    outputs = [name for name in pairs if is_part(name)]
    if adapted := [name for name in outputs if pairs[name]["B"].any()]:
        raise AdapterError(
            f"{adapted[0].replace(_OUTPUT, '')} has an adapter on its output projection, which versions of PEFT add "
            "once or twice: merge it with PEFT's merge_and_unload and use the merged model"
        )
    attentions = {name.removesuffix(_OUTPUT) for name in outputs}
    return {
        join(name, INPUT) if name in attentions else name: pair for name, pair in pairs.items() if name not in outputs
    }


def is_part(name: str) -> bool:
    """Whether PEFT adapts a layer with the attention around it, so that its config does not name the layer.

    Args:
        name: PEFT's name of the layer.
    """
    return name.endswith(_OUTPUT)


def peft_name(name: str) -> str:
    """PEFT's name of the attention, if a layer is the input projection of one; else the same name.

    Args:
        name: Name of the layer here.
    """
    return name.removesuffix(f".{INPUT}")
