"""A faster timm vision transformer with the same results up to rounding."""

from functools import partial
from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from vitlorafa.convolutions import PatchConv2d, cuts_patches
from vitlorafa.layers import FastLinear, LoRALinear
from vitlorafa.ops import linear
from vitlorafa.ops.attention import attention
from vitlorafa.ops.private import inside_torch_func
from vitlorafa.wrappers import unwrap


def speed_up(model: nn.Module, *, recompute: bool = False) -> nn.Module:
    """Makes a timm vision transformer faster, in place; logits and gradients stay the same up to rounding.

    Models of other libraries stay as they are.

    - Attention: each timm `Attention`, in any model, uses `vitlorafa.ops.attention`, which is faster than torch's fused
      attention on some CPUs (see `vitlorafa.tuning`). With a mask, with attention dropout, or if timm's `fused_attn`
      is off, timm's own code runs.
    - Class token: a `VisionTransformer` that pools the class token ("token") needs no other token after its last
      attention. In `model(images)`, the last block therefore computes queries, projection, norm and MLP for that token
      only. This saves 9/12 of the matmuls in the linear layers of one block, forward and backward.
    - Residual additions: each timm `Block`, in any model, adds in place where no gradient is needed and no hook could
      keep the tensor, with bit-identical results.
    - MLP: each timm `Mlp`, in any model, computes exact GELU together with its first layer's matmul where no gradient
      is needed, on some CPUs. If a hook needs the tensor between the two, timm's own code runs.
    - Patch embedding: the convolution of each timm `PatchEmbed`, in any model, is computed as a matmul on some CPUs.

    Subclasses of these classes, and other classes, are not changed. Dropout after the last attention (`proj_drop`)
    draws a mask of another shape.

    Only the classes of modules change, to subclasses defined here. Parameters, names, hooks, copies, gradient
    checkpointing and compilation work as before, and adapters can be added before or after. `forward_features`,
    `forward_intermediates` and similar methods return all tokens, as in timm. In `model(images)`, a hook on the last
    block sees the class token only, [B, 1, d], and a hook on the container `model.blocks` is not called.

    Args:
        model: A timm model, or a module that contains some, adapted or not. In a second call, only `recompute` matters.
        recompute: Whether attention weights are recomputed in backward instead of being kept (B·H·N² elements per
            block). This is slower, but keeps less memory than torch's fused attention.

    Returns:
        The same model.
    """
    module: Any
    unwrap(model)  # refuses what is no module
    for module in list(model.modules()):
        fast, children = _FAST.get(type(module), (None, set()))
        if fast is not None and module._modules.keys() <= children:
            module.__class__ = fast
        if isinstance(module, FastAttention):
            module.recompute = recompute
    for module in list(model.modules()):
        if type(module) is PatchEmbed and cuts_patches(module.proj):
            module.proj.__class__ = PatchConv2d
        if type(module) is Block and isinstance(module.attn, FastAttention) and module._modules.keys() <= _IN_BLOCK:
            module.__class__ = FastBlock
    for module in list(model.modules()):
        if type(module) is VisionTransformer and len(module.blocks) and isinstance(module.blocks[-1], FastBlock):
            module.__class__ = ClassTokenTransformer
    return model


class FastAttention(Attention):
    """timm's attention, computed by `vitlorafa.ops.attention`.

    Attributes:
        recompute: Whether attention weights are recomputed in backward instead of being kept.
    """

    recompute = False

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, queries: int | None = None
    ) -> Tensor:
        """[B, N, d] -> [B, N, d], or only the first `queries` tokens of it."""
        masks = _non_default(attn_mask, is_causal)
        drops = self.training and self.attn_drop.p > 0
        if masks or drops or not self.fused_attn:
            return super().forward(x, **masks)[:, :queries]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = attention(self.q_norm(q[:, :, :queries]), self.k_norm(k), v, recompute=self.recompute)
        y = self.norm(y.transpose(1, 2).flatten(2))
        gate = getattr(self, "gate", None)  # older versions of timm have none
        if gate is not None:
            y = y * gate(x[:, :queries]).sigmoid()
        return self.proj_drop(self.proj(y))


class FastMlp(Mlp):
    """timm's MLP, computed by `vitlorafa.ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        first, act = self.fc1, self.act
        is_exact_gelu = type(act) is nn.GELU and act.approximate == "none"
        adapted = isinstance(first, LoRALinear)
        is_supported = adapted or type(first) in (nn.Linear, FastLinear)
        if not (is_exact_gelu and is_supported) or _has_hooks(first) or _has_hooks(act):
            return super().forward(x)
        x = first(x, gelu=True) if adapted else linear(x, first.weight, first.bias, gelu=True)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


class FastBlock(Block):
    """timm's block, which can skip tokens that are not needed, and adds in place where no gradient is needed."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        queries: int | None = None,
        may_overwrite: bool = False,
    ) -> Tensor:
        """[B, N, d] -> [B, N, d], or only the first `queries` tokens of it; x may be overwritten if allowed."""
        masks = _non_default(attn_mask, is_causal)
        options = masks if queries is None else {**masks, "queries": queries}
        branch = self.drop_path1(self.ls1(self.attn(self.norm1(x), **options)))
        x = _add(x[:, :queries], branch, may_overwrite and not _has_hooks(self.norm1))
        return _add(x, self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), not _has_hooks(self.norm2))


def _add(x: Tensor, branch: Tensor, may_overwrite: bool) -> Tensor:
    """x + branch, in the memory of x if it may be overwritten and autograd keeps neither."""
    is_kept = x.requires_grad or branch.requires_grad or torch.compiler.is_compiling() or inside_torch_func()
    if not may_overwrite or is_kept or torch.promote_types(x.dtype, branch.dtype) != x.dtype:
        return x + branch
    return x.add_(branch)


class ClassTokenTransformer(VisionTransformer):
    """timm's vision transformer, whose last block computes only the class token if nothing else is pooled."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, channels, height, width] -> logits [B, num_classes]."""
        masks = _non_default(attn_mask, is_causal)
        pools_class_token = self.global_pool == "token" and self.attn_pool is None
        if masks or not pools_class_token or not isinstance(self.blocks[-1], FastBlock):
            return super().forward(x, **masks)
        return self.forward_head(self.class_token(x))

    def class_token(self, x: Tensor) -> Tensor:
        """`forward_features(x)[:, :1]`, the part that `forward_head` reads, at lower cost.

        Args:
            x: Images, [B, channels, height, width].

        Returns:
            The class token after the last norm, [B, 1, d].
        """
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            # The first block's input may be the caller's tensor, and hooks may keep a block's.
            free = index > 0 and not _has_hooks(block) and not _has_hooks(self.blocks[index - 1])
            block = partial(block, queries=1 if index == last else None, may_overwrite=free)
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return self.norm(x)


# Children that the methods above use. Modules with others, as in newer versions of timm, are not changed.
_IN_ATTENTION = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
_IN_MLP = {"fc1", "act", "drop1", "norm", "fc2", "drop2"}
_IN_BLOCK = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_FAST: dict[type, tuple[type, set[str]]] = {Attention: (FastAttention, _IN_ATTENTION), Mlp: (FastMlp, _IN_MLP)}


def _non_default(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """The arguments that differ from their defaults; older versions of timm do not have `is_causal`."""
    return {
        **({} if attn_mask is None else {"attn_mask": attn_mask}),
        **({"is_causal": True} if is_causal else {}),
    }
