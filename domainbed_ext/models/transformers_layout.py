"""Converts weights from the layout of Hugging Face's transformers (ViT, DeiT, DINOv2 with registers or not) to timm's.

transformers has separate q, k and v, timm stacks them. With registers, timm's position embedding is that of the patches
alone, and the class token's is added to it. timm itself resamples position embeddings of another size.
"""

import re

import torch
from torch import Tensor

_MARK = "embeddings.patch_embeddings.projection.weight"  # which each of these layouts has once
_QKV = re.compile(r"(encoder\.layer\.\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)")
# The first that matches, of names without the prefix such as "vit.".
_NO_PLACE = re.compile(r"(pooler|classifier|cls_classifier|distillation_classifier)\..*|embeddings\.mask_token")
_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.distillation_token", "dist_token"),
        (r"embeddings\.register_tokens", "reg_token"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
        (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"blocks.\1.attn.proj.\2"),
        (r"encoder\.layer\.(\d+)\.(?:intermediate\.dense|mlp\.fc1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
        (r"encoder\.layer\.(\d+)\.(?:output\.dense|mlp\.fc2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
        (r"encoder\.layer\.(\d+)\.mlp\.weights_in\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
        (r"encoder\.layer\.(\d+)\.mlp\.weights_out\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
        (r"encoder\.layer\.(\d+)\.(?:layernorm_before|norm1)\.(\w+)", r"blocks.\1.norm1.\2"),
        (r"encoder\.layer\.(\d+)\.(?:layernorm_after|norm2)\.(\w+)", r"blocks.\1.norm2.\2"),
        (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        (r"layernorm\.(\w+)", r"norm.\1"),
    )
]


def to_timm(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
    """Renames and stacks the tensors of a transformers checkpoint.

    Args:
        tensors: Tensors by their names in the file, under any prefix.

    Returns:
        The backbone's tensors by timm's names, those that are not known by their own, and the names in the file that
        have no place in a backbone (heads, the pooler); None if the file is not in this layout.
    """
    prefix = next((name.removesuffix(_MARK) for name in tensors if name.endswith(_MARK)), None)
    if prefix is None:
        return None
    converted: dict[str, Tensor] = {}
    stacks: dict[str, dict[str, Tensor]] = {}
    left_out = []
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(prefix)
        if not full_name.startswith(prefix) or _NO_PLACE.fullmatch(name):
            left_out.append(full_name)
        elif match := _QKV.fullmatch(name):
            layer, part, kind = match.groups()
            stacks.setdefault(f"{layer.replace('encoder.layer', 'blocks')}.attn.qkv.{kind}", {})[part] = tensor
        else:
            converted[_renamed(name)] = tensor
    for name, parts in stacks.items():
        if parts.keys() == {"query", "key", "value"}:  # else the layer counts as missing
            converted[name] = torch.cat([parts[part] for part in ("query", "key", "value")])
    if converted.keys() >= {"reg_token", "cls_token", "pos_embed"}:
        positions = converted["pos_embed"]
        converted |= {"cls_token": converted["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    return converted, left_out


def _renamed(name: str) -> str:
    return next((match.expand(new) for old, new in _NAMES if (match := old.fullmatch(name))), name)
