"""A vision transformer small enough to ship: `vit_pico_patch8_32`, registered with timm on import.

0.8 million parameters, 32 px images, 16 patches of 8 px and a class token. Its weights lie in the package
(`models/assets/`, half precision, no head) and were made by `python -m domainbed_ext.pretrain` from drawn
glyphs and shapes alone. After `import domainbed_ext.models.vit_pico` it is a timm model like any other:

    model = timm.create_model("vit_pico_patch8_32", pretrained=True, num_classes=10)
"""

from pathlib import Path
from typing import Any

from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn

__all__ = ["NAME", "WEIGHTS"]  # register_model adds the model

NAME = "vit_pico_patch8_32"
WEIGHTS = Path(__file__).with_name("assets") / f"{NAME}.safetensors"

# timm's register_model looks this name up in the module. num_classes=0 says that the file holds no head:
# any other number of classes gets a fresh one, and no number at all gives the features.
default_cfgs = generate_default_cfgs(
    {
        f"{NAME}.glyphs": {
            "file": str(WEIGHTS),
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "mit",
        }
    }
)


@register_model
def vit_pico_patch8_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Builds the model: width 128, 4 blocks, 4 heads.

    Args:
        pretrained: whether to load the packaged weights.
        **kwargs: passed on to `timm.models.VisionTransformer`, over the values above.

    Returns:
        The model, for images [n, 3, 32, 32].
    """
    shape = {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4}
    return build_model_with_cfg(
        VisionTransformer,
        NAME,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,  # resamples the position embedding for other input sizes
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**shape, **kwargs},
    )
