import timm
import torch
from torch import Tensor, nn

from vitlorafa import adapter_layers

_SMALL = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
_SMALL14 = {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 3}
_SWIN = {"img_size": 32, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)}

# timm's name -> how to build a small one of the same structure.
ARCHITECTURES: dict[str, dict] = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "vit_small_patch16_224": _SMALL,
    "vit_base_patch16_224": _SMALL,
    "vit_small_patch16_18x2_224": _SMALL,  # attentions and MLPs in parallel
    "deit3_small_patch16_224": _SMALL,
    "deit_tiny_distilled_patch16_224": _SMALL,  # two heads
    "beit_base_patch16_224": _SMALL,  # reads qkv.weight
    "beitv2_base_patch16_224": _SMALL,
    "eva_giant_patch14_224": _SMALL14,  # reads qkv.weight
    "eva02_tiny_patch14_224": _SMALL14,  # fused qkv, packed SwiGLU
    "eva02_base_patch14_224": _SMALL14,  # q_proj, k_proj, v_proj, SwiGLU of two linears
    "vit_small_patch16_dinov3": _SMALL,
    "vit_small_patch14_reg4_dinov2": _SMALL14,
    "vit_giant_patch14_reg4_dinov2": _SMALL14,  # packed SwiGLU
    "vit_base_patch16_siglip_224": _SMALL,  # attention pool with linears of the same names
    "vit_base_patch16_clip_224": _SMALL,
    "swin_tiny_patch4_window7_224": dict(_SWIN, window_size=2),
    "swinv2_tiny_window8_256": dict(_SWIN, window_size=4),  # reads qkv.weight; an MLP inside the attention
    "test_vit": {"img_size": 32},
}


def build(architecture: str, **kwargs) -> nn.Module:
    """A small model in eval mode, all of whose parameters matter (timm starts many near zero)."""
    torch.manual_seed(0)
    model = timm.create_model(
        architecture, pretrained=False, **{"num_classes": 5, **ARCHITECTURES[architecture], **kwargs}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def perturb(model: nn.Module, only: str | None = None) -> None:
    """Moves the factors away from their start, as training would."""
    with torch.no_grad():
        for name, layer in adapter_layers(model):
            if only in (None, name):
                layer.lora_A.add_(0.1 * torch.randn_like(layer.lora_A))
                layer.lora_B.add_(0.1 * torch.randn_like(layer.lora_B))


def images(model: nn.Module, n: int = 2) -> Tensor:
    size = getattr(model.patch_embed, "img_size", (32, 32))
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(1))
