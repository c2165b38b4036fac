"""The strength of the update: how much of what training changed is in the weights."""

from torch import nn

from vitlorafa.adapted import adapted_models, adapter_layers
from vitlorafa.config import parse_number
from vitlorafa.errors import AdapterError


def set_strength(model: nn.Module, strength: float) -> nn.Module:
    """Scales each update: from now on, an adapted layer computes with W + a·s·B·A.

    At strength 0, all adapted layers are exactly the pretrained ones; at strength 1, as after `inject` and
    `load_adapter`, they have the trained update. Merged layers stay merged, with the scaled update. Where the update
    did not start at zero ("pissa", "milora"), it is a·s·(B·A − B₀·A₀). Other trained parts, such as the head or
    unfrozen norms, keep their values.

    The strength belongs to the model in memory: `save_adapter` and `state_dict` save the trained factors, whatever the
    strength, and loading keeps the model's. `merge_and_unload` adds the scaled update.

    Args:
        model: Adapted model, merged or not, or a module that wraps or holds it.
        strength: Share a of the update, from 0 to 1.

    Returns:
        The same model.

    Raises:
        AdapterError: If the strength is not a number from 0 to 1, or the model is not adapted.
    """
    strength = parse_number("strength", strength)
    if not 0 <= strength <= 1:
        raise AdapterError(
            f"strength must be from 0 to 1, not {strength:g}: 0 is the pretrained model, 1 the trained one"
        )
    adapted_models(model)
    for _, layer in adapter_layers(model):
        merged = layer.merged
        layer.unmerge()
        layer.strength = strength
        if merged:
            layer.merge()
    return model
