"""Linear layers that a user names, by a pattern or by a mapping, in models whose structure is not known."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError
from vitlorafa.heads import find_heads
from vitlorafa.layers import LoRALinear
from vitlorafa.packed_attention import INPUT, OUTPUT, UnpackedAttention, is_packed
from vitlorafa.quantised_weight import quantised_weight
from vitlorafa.sites import Site, linear_sites, list_linear
from vitlorafa.wrappers import join, named_modules

ANY = "linear"  # the projection of a layer of which nothing is known


def config_sites(model: nn.Module, config: AdapterConfig) -> list[Site]:
    """The linear layers that a config can adapt, in the model's order, whatever targets and blocks it chooses.

    They are found by structure, unless the config names them.

    Args:
        model: Model, adapted or not.
        config: Configuration of the adapters.

    Raises:
        AdapterError: If a pattern matches the name of no linear layer.
    """
    if config.sites:
        return _mapped(model, config.sites)
    return _matching(model, config.pattern) if config.pattern else linear_sites(model)


def _mapped(model: nn.Module, mapping: tuple[tuple[str, tuple[str, ...]], ...]) -> list[Site]:
    """The layers whose names a mapping matches, with its targets; the first pattern counts."""
    candidates = list(linear_layers(model))
    for pattern, _ in mapping:
        if not any(re.fullmatch(pattern, name) for name, _, _ in candidates):
            raise _no_match(model, f"sites has {pattern!r}, which")
    sites = []
    for name, owner, attribute in candidates:
        targets = next((targets for pattern, targets in mapping if re.fullmatch(pattern, name)), None)
        if targets is not None:
            sites.append(Site(name, owner, attribute, targets, name.rpartition(".")[0]))
    return sites


def _matching(model: nn.Module, pattern: str) -> list[Site]:
    """The layers whose names a pattern matches: those that are known by structure, and others as one projection."""
    known = {site.name: site for site in linear_sites(model)}
    sites = [
        known.get(name) or Site(name, owner, attribute, _targets(owner, attribute), name.rpartition(".")[0])
        for name, owner, attribute in linear_layers(model)
        if re.fullmatch(pattern, name)
    ]
    if not sites:
        raise _no_match(model, f"targets is the pattern {pattern!r}, which")
    return sites


def _targets(owner: nn.Module, attribute: str) -> tuple[str, ...]:
    if is_packed(owner) or isinstance(owner, UnpackedAttention):
        return ("q", "k", "v") if attribute == INPUT else ("proj",)
    return (ANY,)


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Names, owners and attributes of all linear layers outside the classifier, those of packed attentions included.

    Args:
        model: Model, adapted or not.
    """
    heads = {module for head in find_heads(model) for module in head.modules()}
    for owner_name, owner in named_modules(model):
        if owner in heads or isinstance(owner, LoRALinear):
            continue
        if is_packed(owner):
            yield from ((join(owner_name, attribute), owner, attribute) for attribute in (INPUT, OUTPUT))
            continue
        for attribute, child in owner.named_children():
            if child not in heads and _is_linear(child):
                yield join(owner_name, attribute), owner, attribute


def _is_linear(module: Any) -> bool:
    return isinstance(module, (nn.Linear, LoRALinear)) or quantised_weight(module) is not None


def _no_match(model: nn.Module, what: str) -> AdapterError:
    return AdapterError(
        f"{what} matches the full name of no linear layer in this {type(model).__name__}: its linear layers are "
        f"{list_linear(model) or 'none'}"
    )
