"""Small random models of other libraries than timm, of the structure of the large ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
_WIDE = {**_SIZES, "intermediate_size": 64}
_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def _transformers(model: str, config: str, sizes: dict, **more: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, model)(getattr(transformers, config)(**sizes, **more))

    return make


def _torchvision() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=5)


def _open_clip() -> nn.Module:
    pytest.importorskip("open_clip")
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(32, 16, 32, 2, 2, 2.0, output_dim=5)


class Encoder(nn.Module):
    """A user's own model around `nn.TransformerEncoder`."""

    def __init__(self, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            32, 2, 64, dropout=0.1, activation="gelu", batch_first=batch_first, norm_first=norm_first
        )
        self.patches = nn.Conv2d(3, 32, 16, 16)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first)
        self.head = nn.Linear(32, 5)
        self.batch_first = batch_first

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = self.encoder(x if self.batch_first else x.transpose(0, 1))
        return self.head(x.mean(1 if self.batch_first else 0))


FOREIGN: dict[str, Callable[[], nn.Module]] = {
    "transformers ViT": _transformers("ViTForImageClassification", "ViTConfig", _WIDE, num_labels=5),
    "transformers DeiT": _transformers("DeiTForImageClassificationWithTeacher", "DeiTConfig", _WIDE, num_labels=5),
    "transformers DINOv2": _transformers(
        "Dinov2ForImageClassification", "Dinov2Config", _SIZES, mlp_ratio=2, num_labels=5
    ),
    "transformers DINOv2 SwiGLU": _transformers("Dinov2Model", "Dinov2Config", _SIZES, use_swiglu_ffn=True),
    "transformers DINOv2 registers": _transformers(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", _SIZES, mlp_ratio=2, num_labels=5
    ),
    "transformers BEiT": _transformers(
        "BeitForImageClassification", "BeitConfig", _WIDE, num_labels=5, use_relative_position_bias=True
    ),
    "transformers SigLIP": _transformers("SiglipVisionModel", "SiglipVisionConfig", _WIDE),
    "transformers CLIP": _transformers("CLIPVisionModel", "CLIPVisionConfig", _WIDE),
    "torchvision": _torchvision,
    "open_clip": _open_clip,
    "TransformerEncoder": Encoder,
    "TransformerEncoder, tokens first": lambda: Encoder(batch_first=False),
    "TransformerEncoder, norms first": lambda: Encoder(norm_first=True),
}
PACKED = [name for name in FOREIGN if not name.startswith("transformers ")]


def build_foreign(name: str) -> nn.Module:
    """A small model in eval mode, all of whose parameters matter."""
    torch.manual_seed(0)
    model = FOREIGN[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def run(model: nn.Module, images: Tensor) -> Tensor:
    """The logits, or else the features."""
    output = model(images)
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return output.pooler_output if logits is None else logits


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))
