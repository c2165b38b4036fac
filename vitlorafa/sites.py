"""The linear layers of a vision transformer that can be adapted.

Layers are found by structure, not by the model's name, and only in the repeated transformer blocks. The patch
embedding, the head and attention pools have layers of the same names, which are not adapted; nor are convolutions of
these names, as in squeeze-and-excite. The models are those of timm, transformers, torchvision and open_clip, and any
with `nn.TransformerEncoderLayer`, or with layers that are named and arranged alike.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from vitlorafa.config import TARGETS
from vitlorafa.errors import AdapterError
from vitlorafa.layers import QKV, STACKS
from vitlorafa.packed_attention import INPUT, OUTPUT, UnpackedAttention, input_projection, is_packed
from vitlorafa.wrappers import join, named_modules, unwrap

# Place of a linear layer in an attention or MLP module -> targets that the layer computes.
_NAMES = {"q": "query", "k": "key", "v": "value"}
_ATTENTION: dict[str, tuple[str, ...]] = {
    **{name: targets for name, targets in STACKS.items() if name != INPUT},
    **{f"{before}{name}{after}": (name,) for before, after in (("", ""), ("", "_proj"), ("w", "")) for name in "qkv"},
    # transformers: query in the attention, or in a module of its own beside the output projection
    **{f"{owner}{name}": (target,) for owner in ("", "attention.", "self.") for target, name in _NAMES.items()},
    **dict.fromkeys(("proj", "out_proj", "o_proj", "output.dense"), ("proj",)),
}
_PACKED: dict[str, tuple[str, ...]] = {INPUT: QKV, OUTPUT: ("proj",)}
_MLP: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("fc1", "fc1_g", "fc1_x", "w0", "w1"), ("fc1",)),
    **dict.fromkeys(("fc2", "w2"), ("fc2",)),
    # transformers (the second of them up to version 4), open_clip, torch
    **dict.fromkeys(("gate_proj", "up_proj", "weights_in", "intermediate.dense", "c_fc", "linear1"), ("fc1",)),
    **dict.fromkeys(("down_proj", "weights_out", "output.dense", "c_proj", "linear2"), ("fc2",)),
}
_INPUTS = tuple(name for name, targets in _ATTENTION.items() if targets != ("proj",))
_OUTPUTS = tuple(name for name, targets in _ATTENTION.items() if targets == ("proj",))
_FIRST = {name for name, targets in _MLP.items() if targets == ("fc1",)} - {"fc1_x", "w1"}
_LAST = {name for name, targets in _MLP.items() if targets == ("fc2",)}


class Site(NamedTuple):
    """A linear layer of a transformer block that can be adapted.

    Attributes:
        name: Name of the layer within the model.
        owner: Attention or MLP module that holds the layer.
        attribute: Attribute of the owner that is the layer.
        targets: Projections that the layer computes; if they are several, as equal parts of its outputs in this order.
        block: Name of the block within the model.
    """

    name: str
    owner: nn.Module
    attribute: str
    targets: tuple[str, ...]
    block: str

    @property
    def layer(self) -> Any:
        """The linear layer; that of q, k and v of a packed attention shares its parameters."""
        is_packed = isinstance(self.owner, nn.MultiheadAttention) and self.attribute == INPUT
        return input_projection(self.owner) if is_packed else getattr(self.owner, self.attribute)


def transformer_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer blocks with their names, in the model's order.

    These are the innermost elements of a Sequential or ModuleList with both an attention and an MLP, and elements
    outside of these with an attention only, such as the fusion of CrossViT. Each `nn.TransformerEncoderLayer` is one.

    Args:
        model: Model that is or will be adapted.
    """
    attentive = [(name, element) for name, element in elements(model) if any(map(_is_attention, element.modules()))]
    blocks = innermost([(name, element) for name, element in attentive if any(map(_is_mlp, element.modules()))])
    names = [name for name, _ in blocks]
    attention_only = innermost([(name, element) for name, element in attentive if not overlaps(name, names)])
    order = [name for name, _ in attentive]
    return sorted([*blocks, *attention_only], key=lambda block: order.index(block[0]))


def linear_sites(model: nn.Module) -> list[Site]:
    """The linear layers that can be adapted, in the model's order; those that are adapted already are included."""
    sites = []
    for block_name, block in transformer_blocks(model):
        attention = None
        for name, module in named_modules(block, block_name):
            if attention is not None and name.startswith(attention + "."):
                continue  # such as the MLP for the position bias of Swin v2
            places: dict[str, tuple[str, ...]] = {}
            if _is_attention(module):
                attention, places = name, _PACKED if _is_multihead(module) else _ATTENTION
            elif _is_mlp(module):
                places = _sequence(module) or _MLP
            sites += [
                _site(name, module, place, targets, block_name)
                for place, targets in places.items()
                if place == INPUT or _has(module, place)
            ]
    return sites


def _site(name: str, module: nn.Module, place: str, targets: tuple[str, ...], block: str) -> Site:
    before, _, attribute = place.rpartition(".")
    owner = _child(module, before) if before else module
    assert owner is not None
    return Site(join(name, place), owner, attribute, targets, block)


def has_equal_parts(site: Site) -> bool:
    """Whether the outputs of a layer are those of its targets, one after the other and of equal width.

    False for the global attention of GCViT (no q), for EfficientFormer (unequal widths), and for TinyViT and MaxViT
    (stacked by head).
    """
    attention, outputs = site.owner, site.layer.out_features
    if getattr(attention, "head_first", False) or hasattr(attention, "key_dim"):
        return False
    output: Any = next((_child(attention, place) for place in _OUTPUTS if _has(attention, place)), None)
    if "v" in site.targets and output is not None:  # the width of v is the input width of proj
        return outputs == len(site.targets) * output.in_features
    return outputs % len(site.targets) == 0


def check_targets(model: nn.Module, sites: list[Site], wanted: Iterable[str]) -> None:
    """Checks that a model has layers for all wanted targets.

    Args:
        model: The timm model.
        sites: All of its linear layers that can be adapted.
        wanted: Targets to adapt.

    Raises:
        AdapterError: If there is no layer that can be adapted, or none for one of the targets. The message names what
            the model has.
    """
    existing = {target for site in sites for target in site.targets}
    if not existing:
        raise AdapterError(f"nothing to adapt in this {type(model).__name__}: {_why_nothing(model)}")
    missing = [target for target in wanted if target not in existing]
    if missing:
        names = ", ".join(target for target in TARGETS if target in existing)
        raise AdapterError(f"this {type(model).__name__} has no {', '.join(missing)}: its targets are {names}")


def in_blocks(model: nn.Module, sites: list[Site], blocks: Sequence[int] | None) -> list[Site]:
    """The layers in some of the transformer blocks.

    Args:
        model: The timm model.
        sites: All of its linear layers that can be adapted.
        blocks: Numbers of the blocks, counted from 0, or from the end if negative; None for all blocks.

    Raises:
        AdapterError: If the model does not have a block.
    """
    if blocks is None:
        return sites
    names = [name for name, _ in transformer_blocks(model)]
    outside = [str(block) for block in blocks if not -len(names) <= block < len(names)]
    if outside:
        raise AdapterError(
            f"this {type(model).__name__} has {len(names)} blocks, so blocks may be -{len(names)} to {len(names) - 1}, "
            f"not {', '.join(outside)}"
        )
    chosen = {names[block] for block in blocks}
    return [site for site in sites if site.block in chosen]


def elements(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The elements of each Sequential and ModuleList, and each `nn.TransformerEncoderLayer`, with their names.

    Args:
        model: Any module.
    """
    found: dict[str, nn.Module] = {}
    for name, module in named_modules(model):
        if isinstance(module, nn.TransformerEncoderLayer):
            found[name] = module
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            found |= {join(name, index): element for index, element in module.named_children()}
    return list(found.items())


def innermost(elements: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The modules in which none of the others lies.

    Args:
        elements: Modules with their names.
    """
    names = [name for name, _ in elements]
    return [(name, block) for name, block in elements if not any(other.startswith(name + ".") for other in names)]


def overlaps(name: str, blocks: Iterable[str]) -> bool:
    """Whether a module lies in one of the blocks, or one of them in it.

    Args:
        name: Name of the module.
        blocks: Names of the blocks.
    """
    return any(f"{name}.".startswith(f"{block}.") or f"{block}.".startswith(f"{name}.") for block in blocks)


def _is_attention(module: nn.Module) -> bool:
    if _is_multihead(module):
        return True
    has_both = any(_has(module, name) for name in _OUTPUTS) and any(_has(module, name) for name in _INPUTS)
    return has_both and _holds_linear(module, _ATTENTION)


def _is_multihead(module: nn.Module) -> bool:
    return is_packed(module) or isinstance(module, UnpackedAttention)


def _is_mlp(module: nn.Module) -> bool:
    has_both = any(_has(module, name) for name in _FIRST) and any(_has(module, name) for name in _LAST)
    return (has_both and _holds_linear(module, _MLP)) or bool(_sequence(module))


def _sequence(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """The places of the two layers of an MLP that is a Sequential, as in torchvision; empty for other modules.

    It widens and narrows again, and nothing but dropout follows, unlike in squeeze-and-excite.
    """
    if not isinstance(module, nn.Sequential):
        return {}
    layers: list[tuple[str, Any]] = [each for each in module.named_children() if hasattr(each[1], "in_features")]
    if len(layers) != 2:
        return {}
    (first, wide), (last, narrow) = layers
    after = list(module._modules)[list(module._modules).index(last) + 1 :]
    ends = all(isinstance(module._modules[name], (nn.Dropout, nn.Identity)) for name in after)
    widens = wide.in_features == narrow.out_features <= wide.out_features == narrow.in_features
    return {first: ("fc1",), last: ("fc2",)} if widens and ends else {}


def _holds_linear(module: nn.Module, names: Iterable[str]) -> bool:
    """Whether any of these children is a linear layer, so that the module does not consist of convolutions."""
    return any(_is_linear(module, name) for name in names)


def _is_linear(module: nn.Module, child: str) -> bool:
    """Whether a child has the attributes of a linear layer; convolutions and wrapping modules do not."""
    return hasattr(_child(module, child), "in_features")


def _has(module: nn.Module, child: str) -> bool:
    return not isinstance(_child(module, child), (nn.Identity, type(None)))


def _child(module: nn.Module, place: str) -> nn.Module | None:
    """The child of a module, or one further below, such as "attention.query"; None if there is none."""
    first, _, rest = place.partition(".")
    child = module._modules.get(first)
    return _child(unwrap(child), rest) if rest and child is not None else child


def _why_nothing(model: nn.Module) -> str:
    names = list_linear(model)
    remedy = "; choose some by a pattern, targets=r'...'" if names else ""
    return (
        "it has no transformer blocks with an attention whose linear layers are named as in timm, transformers, "
        f"torchvision or open_clip, such as qkv and proj; its linear layers are {names or 'none'}{remedy}"
    )


def list_linear(model: nn.Module) -> str:
    """The names of a model's linear layers, with N for numbers, as in a sentence; empty if it has none.

    Args:
        model: Any module.
    """
    linear = [name for name, module in named_modules(model) if isinstance(module, nn.Linear)]
    patterns = list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", name) for name in linear))
    return ", ".join(patterns[:8]) + (", ..." if len(patterns) > 8 else "")
