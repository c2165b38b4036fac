"""The classifier of a model, which is not adapted."""

from torch import nn

from vitlorafa.wrappers import named_modules

# Names of the classifier in models that are not timm's: transformers, torchvision, and what people call their own.
_NAMES = ("classifier", "cls_classifier", "distillation_classifier", "heads", "head", "fc")


def find_heads(model: nn.Module) -> list[nn.Module]:
    """The classifier; several for models such as distilled ones and VOLO; none for a model without a head.

    timm's models say which it is. In others it is a child with a usual name that consists of linear layers.

    Args:
        model: The adapted model, or the one to adapt.
    """
    if not hasattr(model, "get_classifier"):
        if any(hasattr(module, "get_classifier") for _, module in named_modules(model)):  # holds several timm models
            return []
        return [child for name, child in model.named_children() if name in _NAMES and _is_head(child)]
    head = model.get_classifier()  # type: ignore[operator]
    heads = [each for each in (head if isinstance(head, tuple) else (head,)) if each is not None]
    within = {module for head in heads for module in head.modules()}
    # VOLO's get_classifier() leaves out the auxiliary head, whose logits are added; its config names both.
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    named = (named,) if isinstance(named, str) else named
    return heads + [module for name, module in named_modules(model) if name in named and module not in within]


def _is_head(module: nn.Module) -> bool:
    """Whether it is a linear layer or a sequence with some, unlike the attention pool `head` of SigLIP."""
    if isinstance(module, nn.Sequential):
        return any(isinstance(each, nn.Linear) for each in module)
    return isinstance(module, nn.Linear)
