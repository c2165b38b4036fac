"""What is left unadapted in a model, in words."""

from collections.abc import Collection, Iterable

from torch import nn
from torch.nn.modules.conv import _ConvNd

from vitlorafa.config import TARGETS, AdapterConfig
from vitlorafa.errors import abbreviate
from vitlorafa.named_sites import config_sites, linear_layers
from vitlorafa.sites import Site, elements, innermost, overlaps
from vitlorafa.wrappers import named_modules, named_parameters

_HYBRID = 0.1  # share of the weights that are convolutions' from which on a model is called a hybrid


def describe_gaps(model: nn.Module, config: AdapterConfig, heads: Iterable[nn.Module] = ()) -> str:
    """A sentence about parts of a model that are not adapted, or only in part; empty if there are none.

    Blocks that `config.blocks` leaves out and targets that `config.targets` leaves out are no such parts; nor are
    embeddings and heads.

    Args:
        model: Model, adapted or not.
        config: Configuration of its adapters.
        heads: Classifiers.
    """
    if config.blocks is not None:
        return ""
    sites = config_sites(model, config)
    if config.pattern or config.sites:
        parts = _linear_layers(model, sites)
    else:
        parts = _blocks(model, sites, config.targets, heads)
        parts += _convolutions(model, sites, heads) if set(config.targets) == set(TARGETS) else []
    return f"parts of this {type(model).__name__} are not adapted and stay frozen: {'; '.join(parts)}" if parts else ""


def _blocks(model: nn.Module, sites: Iterable[Site], wanted: Collection[str], heads: Iterable[nn.Module]) -> list[str]:
    """Blocks without some of the targets, and repeated modules that are no blocks."""
    adapted: dict[str, set[str]] = {}
    for site in sites:
        adapted.setdefault(site.block, set()).update(site.targets)
    partial: dict[str, list[str]] = {}
    for block, targets in adapted.items():
        if missing := ", ".join(target for target in TARGETS if target in wanted and target not in targets):
            partial.setdefault(missing, []).append(block)
    parts = [f"{_count('block', blocks)} without {missing}" for missing, blocks in partial.items()]
    if unadapted := _blocks_without_attention(model, adapted, heads):
        parts.append(f"{_count('block', unadapted)} without an attention")
    return parts


def _blocks_without_attention(model: nn.Module, blocks: Collection[str], heads: Iterable[nn.Module]) -> list[str]:
    """Repeated modules with two linear layers or more that are not blocks and contain none."""
    in_heads = _modules_of(heads)
    candidates = [
        (name, element)
        for name, element in elements(model)
        if sum(isinstance(module, nn.Linear) and module not in in_heads for module in element.modules()) > 1
        and not overlaps(name, blocks)
    ]
    return [name for name, _ in innermost(candidates)]


def _convolutions(model: nn.Module, sites: Iterable[Site], heads: Iterable[nn.Module]) -> list[str]:
    """The convolutions of a hybrid outside of attentions and MLPs, but for those that read the images.

    There are none if they are a small part of the model.
    """
    left_out = _modules_of([*heads, *(site.owner for site in sites)])
    sizes = {
        name: module.weight.numel()
        for name, module in named_modules(model)
        if isinstance(module, _ConvNd) and module.in_channels > 4 and module not in left_out
    }
    total = sum(p.numel() for name, p in named_parameters(model) if p.dim() > 1 and not _is_factor(name))
    share = sum(sizes.values()) / max(total, 1)
    return [f"{_count('convolution', [*sizes])} with {100 * share:.0f} % of the weights"] if share >= _HYBRID else []


def _linear_layers(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """The linear layers that a pattern or mapping does not name."""
    adapted = {site.name for site in sites}
    left = [name for name, _, _ in linear_layers(model) if name not in adapted]
    return [_count("linear layer", left)] if left else []


def _modules_of(owners: Iterable[nn.Module]) -> set[nn.Module]:
    return {module for owner in owners for module in owner.modules()}


def _is_factor(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_A", "lora_B")


def _count(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind}{'s' * (len(names) > 1)} ({abbreviate(names)})"
