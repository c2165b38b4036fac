"""The linear layers of a timm vision transformer that can be adapted.

Layers are found by structure, not by the model's name, and only in the repeated transformer blocks. The patch
embedding, the head and attention pools have layers of the same names, which are not adapted; nor are convolutions of
these names, as in squeeze-and-excite.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from vitlorafa.config import TARGETS
from vitlorafa.errors import AdapterError, abbreviate
from vitlorafa.layers import STACKS
from vitlorafa.wrappers import join, named_modules

# Attribute of an attention or MLP module -> targets that this linear layer computes.
_ATTENTION: dict[str, tuple[str, ...]] = {
    **STACKS,
    **{f"{before}{name}{after}": (name,) for before, after in (("", ""), ("", "_proj"), ("w", "")) for name in "qkv"},
    "proj": ("proj",),
}
_MLP: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("fc1", "fc1_g", "fc1_x", "w0", "w1"), ("fc1",)),
    **dict.fromkeys(("fc2", "w2"), ("fc2",)),
}
_INPUTS = tuple(name for name in _ATTENTION if name != "proj")
_FIRST, _LAST = {"fc1", "fc1_g", "w0"}, {"fc2", "w2"}


class Site(NamedTuple):
    """A linear layer of a transformer block that can be adapted.

    Attributes:
        name: Name of the layer within the model.
        owner: Attention or MLP module that holds the layer.
        attribute: Attribute of the owner that is the layer.
        targets: Projections that the layer computes.
        block: Name of the block within the model.
    """

    name: str
    owner: nn.Module
    attribute: str
    targets: tuple[str, ...]
    block: str


def transformer_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer blocks with their names, in the model's order.

    These are the innermost elements of a Sequential or ModuleList with both an attention and an MLP, and elements
    outside of these with an attention only, such as the fusion of CrossViT.

    Args:
        model: The timm model.
    """
    attentive = [(name, element) for name, element in _elements(model) if any(map(_is_attention, element.modules()))]
    blocks = _innermost([(name, element) for name, element in attentive if any(map(_is_mlp, element.modules()))])
    names = [name for name, _ in blocks]
    attention_only = _innermost([(name, element) for name, element in attentive if not _overlaps(name, names)])
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
            attributes: dict[str, tuple[str, ...]] = {}
            if _is_attention(module):
                attention, attributes = name, _ATTENTION
            elif _is_mlp(module):
                attributes = _MLP
            sites += [
                Site(f"{name}.{attribute}", module, attribute, targets, block_name)
                for attribute, targets in attributes.items()
                if _has(module, attribute)
            ]
    return sites


def has_equal_parts(site: Site) -> bool:
    """Whether the outputs of a layer are those of its targets, one after the other and of equal width.

    False for the global attention of GCViT (no q), for EfficientFormer (unequal widths), and for TinyViT and MaxViT
    (stacked by head).
    """
    attention: Any = site.owner
    if getattr(attention, "head_first", False) or hasattr(attention, "key_dim"):
        return False
    outputs = getattr(attention, site.attribute).out_features
    if "v" in site.targets:  # its width is the input width of proj
        return outputs == len(site.targets) * attention.proj.in_features
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


def describe_gaps(model: nn.Module, sites: list[Site], wanted: Collection[str], heads: Iterable[nn.Module] = ()) -> str:
    """A sentence about blocks that are not adapted, or only in part; empty if there are none.

    Args:
        model: The timm model.
        sites: All of its linear layers that can be adapted.
        wanted: Targets to adapt.
        heads: Classifiers, which are not blocks.
    """
    adapted: dict[str, set[str]] = {}
    for site in sites:
        adapted.setdefault(site.block, set()).update(site.targets)
    partial: dict[str, list[str]] = {}
    for block, targets in adapted.items():
        if missing := ", ".join(target for target in TARGETS if target in wanted and target not in targets):
            partial.setdefault(missing, []).append(block)
    parts = [f"{_count_blocks(blocks)} without {missing}" for missing, blocks in partial.items()]
    if unadapted := _blocks_without_attention(model, adapted, heads):
        parts.append(f"{_count_blocks(unadapted)} without an attention")
    return f"parts of this {type(model).__name__} are not adapted and stay frozen: {'; '.join(parts)}" if parts else ""


def _elements(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (join(name, index), element)
        for name, container in named_modules(model)
        if isinstance(container, (nn.Sequential, nn.ModuleList))
        for index, element in container.named_children()
    ]


def _innermost(elements: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    names = [name for name, _ in elements]
    return [(name, block) for name, block in elements if not any(other.startswith(name + ".") for other in names)]


def _overlaps(name: str, blocks: Iterable[str]) -> bool:
    """Whether a module lies in one of the blocks, or one of them in it."""
    return any(f"{name}.".startswith(f"{block}.") or f"{block}.".startswith(f"{name}.") for block in blocks)


def _blocks_without_attention(model: nn.Module, blocks: Collection[str], heads: Iterable[nn.Module]) -> list[str]:
    """Repeated modules with two linear layers or more that are not blocks and contain none."""
    in_heads = {module for head in heads for module in head.modules()}
    candidates = [
        (name, element)
        for name, element in _elements(model)
        if sum(isinstance(module, nn.Linear) and module not in in_heads for module in element.modules()) > 1
        and not _overlaps(name, blocks)
    ]
    return [name for name, _ in _innermost(candidates)]


def _is_attention(module: nn.Module) -> bool:
    return _has(module, "proj") and any(_has(module, name) for name in _INPUTS) and _holds_linear(module, _ATTENTION)


def _is_mlp(module: nn.Module) -> bool:
    has_both = any(_has(module, name) for name in _FIRST) and any(_has(module, name) for name in _LAST)
    return has_both and _holds_linear(module, _MLP)


def _holds_linear(module: nn.Module, names: Iterable[str]) -> bool:
    """Whether any of these children is a linear layer, so that the module does not consist of convolutions."""
    return any(_is_linear(module, name) for name in names)


def _is_linear(module: nn.Module, child: str) -> bool:
    """Whether a child has the attributes of a linear layer; convolutions and wrapping modules do not."""
    return hasattr(module._modules.get(child), "in_features")


def _has(module: nn.Module, child: str) -> bool:
    return not isinstance(module._modules.get(child), (nn.Identity, type(None)))


def _why_nothing(model: nn.Module) -> str:
    packed = [name for name, module in named_modules(model) if isinstance(module, nn.MultiheadAttention)]
    if packed:
        return f"its attention ({packed[0]}) is a packed nn.MultiheadAttention, which is not supported"
    linear = [name for name, module in named_modules(model) if isinstance(module, nn.Linear)]
    patterns = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in linear))
    listed = ", ".join(patterns[:8]) + (", ..." if len(patterns) > 8 else "")
    return (
        f"it has no transformer blocks with an attention whose linear layers are proj and any of {', '.join(_INPUTS)}; "
        f"its linear layers are {listed or 'none'}"
    )


def _count_blocks(names: list[str]) -> str:
    return f"{len(names)} block{'s' * (len(names) > 1)} ({abbreviate(names)})"
