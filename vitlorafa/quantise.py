"""Frozen weights stored in 8 or 4 bits, before or after adapters are added (QLoRA)."""

from torch import nn

from vitlorafa.adapted import timm_model
from vitlorafa.errors import AdapterError, unknown
from vitlorafa.layers import FastLinear, LoRALinear
from vitlorafa.ops.quantised import bitsandbytes
from vitlorafa.origin import remember_digests
from vitlorafa.packed_attention import is_packed
from vitlorafa.quantised_linear import FORMATS, QuantisedLinear
from vitlorafa.quantised_weight import quantised_weight
from vitlorafa.sharding import is_sharded
from vitlorafa.sites import linear_sites


def quantise(model: nn.Module, format: str = "nf4", *, prefix: str | None = None) -> nn.Module:
    """Stores the frozen weights of a timm vision transformer's blocks in 8 or 4 bits, in place.

    These are the frozen ones among the layers that can be adapted: q, k, v, proj, fc1 and fc2 of each block, 95 % of a
    ViT's parameters or more. Trained layers, biases, norms, embeddings, the patch embedding and the head stay as they
    are. With adapters this is QLoRA (Dettmers et al. 2023): gradients flow through the dequantised weights to the
    factors. Adapters can be added before or after; before, freeze the model first: `model.requires_grad_(False)`.
    The q, k and v of an `nn.MultiheadAttention` are quantised only if adapters were added before.

    Args:
        model: Model, adapted or not, or a module that holds it. Shard it or wrap it in DDP afterwards.
        format: "nf4" (4 bits, 0.52 bytes per weight) or "int8" (1 byte per weight).
        prefix: Name of the timm model within `model`, if it holds several.

    Returns:
        The same model.

    Raises:
        AdapterError: If the format is unknown, bitsandbytes is missing, or the model is merged, sharded, or has no
            frozen layer to quantise. The model is then unchanged.
    """
    if format not in FORMATS:
        raise unknown("format of quantised weights", format, FORMATS)
    inner = timm_model(model, prefix)
    if is_sharded(model):
        raise AdapterError("the model is sharded: call quantise before fully_shard or FSDP")
    if any(parameter.is_meta for parameter in inner.parameters()):
        raise AdapterError("the model is on the meta device, without values: load its weights before quantise")
    sites = [site for site in linear_sites(inner) if not is_packed(site.owner)]
    layers = [site.layer for site in sites]
    if any(isinstance(layer, LoRALinear) and layer.merged for layer in layers):
        raise AdapterError("the adapters are merged: call unmerge(model) before quantise")
    places = [
        (layer, "base") if isinstance(layer, LoRALinear) else (site.owner, site.attribute)
        for site, layer in zip(sites, layers, strict=True)
    ]
    places = [(owner, name) for owner, name in places if _can_quantise(getattr(owner, name))]
    if not places:
        raise AdapterError(_why_nothing(inner, layers))
    bitsandbytes()
    remember_digests(inner, [site.name for site in sites])
    for owner, name in places:
        setattr(owner, name, QuantisedLinear(getattr(owner, name), format))
    return model


def _can_quantise(layer: nn.Module) -> bool:
    """Whether it is a plain linear layer with a frozen weight."""
    return (
        type(layer) in (nn.Linear, FastLinear)
        and type(layer.weight) is nn.Parameter
        and layer.weight.is_floating_point()
        and not layer.weight.requires_grad
    )


def _why_nothing(inner: nn.Module, layers: list[nn.Module]) -> str:
    bases = [layer.base if isinstance(layer, LoRALinear) else layer for layer in layers]
    if any(quantised_weight(base) is not None for base in bases):
        return "the frozen layers of the model are quantised already: call dequantise(model) first"
    if bases:
        return "no linear layer of a block is frozen: call inject or model.requires_grad_(False) before quantise"
    return f"this {type(inner).__name__} has no transformer blocks with linear layers: it cannot be quantised"
