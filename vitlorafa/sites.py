"""Which linear layers of a timm vision transformer can be adapted, and which are left out.

Layers are found by structure, not by the model's name, and only inside the repeated transformer blocks: the patch
embedding, the head and attention pools hold layers of the same names, and stay as they are. So do convolutions of such
names, as in squeeze-and-excite.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from torch import nn

from vitlorafa.config import TARGETS
from vitlorafa.errors import AdapterError, abbreviate
from vitlorafa.layers import STACKS
from vitlorafa.wrappers import join, named_modules

# Attribute of an attention or MLP module -> the targets that its linear layer computes.
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
    """A linear layer of a block."""

    name: str  # within the model
    owner: nn.Module  # the attention or MLP module
    attribute: str  # of the owner
    targets: tuple[str, ...]
    block: str  # name of the block within the model


def linear_sites(model: nn.Module) -> list[Site]:
    """The linear layers of all transformer blocks, adapted or not, in the model's order."""
    sites = []
    for block_name, block in _blocks(model):
        attention = None
        for name, module in named_modules(block, block_name):
            if attention is not None and name.startswith(attention + "."):
                continue  # such as the MLP that computes Swin v2's position bias
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


def stacks(site: Site) -> bool:
    """Whether the outputs of a site are those of its targets one after the other, in equal parts.

    Not so in GCViT's global attention (no q) and in EfficientFormer's (unequal widths); and TinyViT's and
    MaxViT's stack by head first.
    """
    attention: Any = site.owner
    if getattr(attention, "head_first", False) or hasattr(attention, "key_dim"):
        return False
    outputs = getattr(attention, site.attribute).out_features
    if "v" in site.targets:  # whose width is that of what proj reads
        return outputs == len(site.targets) * attention.proj.in_features
    return outputs % len(site.targets) == 0


def check_targets(model: nn.Module, sites: list[Site], wanted: Iterable[str]) -> None:
    """Checks that a model has layers for every target that is wanted.

    Raises:
        AdapterError: If it has none at all (names what was looked for, and the linear layers that it has), or none for
            one of them.
    """
    existing = {target for site in sites for target in site.targets}
    if not existing:
        raise AdapterError(f"nothing to adapt in this {type(model).__name__}: {_why_nothing(model)}")
    missing = [target for target in wanted if target not in existing]
    if missing:
        names = ", ".join(target for target in TARGETS if target in existing)
        raise AdapterError(f"this {type(model).__name__} has no {', '.join(missing)}: its targets are {names}")


def gaps(model: nn.Module, sites: list[Site], wanted: Collection[str], heads: Iterable[nn.Module] = ()) -> str:
    """What is left out beside what is adapted, by comparison with the other blocks, in a sentence; empty if nothing.

    Args:
        model: The model.
        sites: All of its sites.
        wanted: The targets to be adapted.
        heads: Its classifiers, which are no blocks.
    """
    adapted: dict[str, set[str]] = {}
    for site in sites:
        adapted.setdefault(site.block, set()).update(site.targets)
    partial: dict[str, list[str]] = {}
    for block, targets in adapted.items():
        if lacking := ", ".join(target for target in TARGETS if target in wanted and target not in targets):
            partial.setdefault(lacking, []).append(block)
    parts = [f"{_counted(blocks)} without {lacking}" for lacking, blocks in partial.items()]
    if others := _other_blocks(model, adapted, heads):
        parts.append(f"{_counted(others)} without an attention")
    return f"parts of this {type(model).__name__} are not adapted and stay frozen: {'; '.join(parts)}" if parts else ""


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The innermost elements of a Sequential or ModuleList that hold both an attention and an MLP.

    And those outside of them that hold an attention alone, such as CrossViT's fusion.
    """
    attentive = [(name, element) for name, element in _elements(model) if any(map(_is_attention, element.modules()))]
    blocks = _innermost([(name, element) for name, element in attentive if any(map(_is_mlp, element.modules()))])
    names = [name for name, _ in blocks]
    alone = _innermost([(name, element) for name, element in attentive if not _overlaps(name, names)])
    order = [name for name, _ in attentive]
    return sorted([*blocks, *alone], key=lambda block: order.index(block[0]))


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
    """Whether one of two modules lies in the other."""
    return any(f"{name}.".startswith(f"{block}.") or f"{block}.".startswith(f"{name}.") for block in blocks)


def _other_blocks(model: nn.Module, blocks: Collection[str], heads: Iterable[nn.Module]) -> list[str]:
    """Repeated modules of two linear layers or more, as blocks have, in which there is no block."""
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
    """Whether any of these children is linear: then it is not made of convolutions, and one among them is an error."""
    return any(_is_linear(module, name) for name in names)


def _is_linear(module: nn.Module, child: str) -> bool:
    """Whether a child has a linear layer's shape, which convolutions and modules around one have not."""
    return hasattr(module._modules.get(child), "in_features")


def _has(module: nn.Module, child: str) -> bool:
    return not isinstance(module._modules.get(child), (nn.Identity, type(None)))


def _why_nothing(model: nn.Module) -> str:
    packed = [name for name, module in named_modules(model) if isinstance(module, nn.MultiheadAttention)]
    if packed:
        return f"its attention ({packed[0]}) is a packed nn.MultiheadAttention, which cannot be adapted"
    linear = [name for name, module in named_modules(model) if isinstance(module, nn.Linear)]
    patterns = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in linear))
    listed = ", ".join(patterns[:8]) + (", ..." if len(patterns) > 8 else "")
    return (
        f"it has no transformer blocks with an attention whose linear layers are proj and any of {', '.join(_INPUTS)}; "
        f"its linear layers are {listed or 'none'}"
    )


def _counted(names: list[str]) -> str:
    return f"{len(names)} block{'s' * (len(names) > 1)} ({abbreviate(names)})"
