"""A timm vision transformer that computes the same with less work."""

from functools import partial
from typing import Any

from timm.layers import Mlp
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from vitlorafa.layers import FastLinear, LoRALinear
from vitlorafa.ops import linear
from vitlorafa.ops.attention import attention


def speed_up(model: nn.Module, *, recompute: bool = False) -> nn.Module:
    """Makes a timm vision transformer compute the same with less work, in place.

    - Every timm `Attention`, in whatever model, computes with `vitlorafa.ops.attention`, which is faster than torch's
      fused attention in bfloat16 on some CPUs; not where there is a mask, attention dropout at work, or timm's
      `fused_attn` switched off.
    - A `VisionTransformer` that pools the class token ("token") needs no other token after its last attention. Called
      as `model(images)`, its last block asks for that token's queries alone, and projects, normalises and passes
      through the MLP nothing but what they get: 9/12 of the products of one block's linear layers less, forward
      and backward.
    - Every timm `Mlp`, in whatever model, makes exact GELU in its first layer's product where no gradient is needed, in
      bfloat16 on some CPUs; not where a hook asks for what lies between the two.

    None of them is there for other classes, not even for subclasses, which stay as they are. Logits and gradients are
    the same up to rounding; dropout behind the last attention (`proj_drop`) draws a mask of other shape.

    Only classes of modules change, to subclasses of this file: parameters, names, hooks, copies, adapters put in
    before or after, gradient checkpointing and compilation are as before. `forward_features`, `forward_intermediates`
    and the like give all tokens, as timm's. In `model(images)` a hook on the last block meets the class token alone,
    [B, 1, d], and one on `model.blocks`, the container, is not called.

    Args:
        model: A timm model, or one that contains some, adapted or not. Once sped up, only `recompute` changes.
        recompute: Whether attention weights are made again in backward instead of being kept, B·H·N² elements a block:
            slower, but keeping less than torch's fused attention.

    Returns:
        The same model.
    """
    module: Any
    for module in list(model.modules()):
        fast, known = _FAST.get(type(module), (None, set()))
        if fast is not None and module._modules.keys() <= known:
            module.__class__ = fast
        if isinstance(module, FastAttention):
            module.recompute = recompute
    for module in list(model.modules()):
        if type(module) is VisionTransformer and _ends_plainly(module.blocks):
            module.blocks[-1].__class__ = ClassTokenBlock
            module.__class__ = ClassTokenTransformer
    return model


class FastAttention(Attention):
    """timm's attention by `vitlorafa.ops.attention`.

    Attributes:
        recompute: Whether to make attention weights again in backward instead of keeping them.
    """

    recompute = False

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, queries: int | None = None
    ) -> Tensor:
        """[B, N, d] -> [B, N, d], or the first `queries` tokens of it."""
        masks = _given(attn_mask, is_causal)
        drops = self.training and self.attn_drop.p > 0
        if masks or drops or not self.fused_attn:
            return super().forward(x, **masks)[:, :queries]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = attention(self.q_norm(q[:, :, :queries]), self.k_norm(k), v, recompute=self.recompute)
        y = self.norm(y.transpose(1, 2).flatten(2))
        gate = getattr(self, "gate", None)  # older timms have none
        if gate is not None:
            y = y * gate(x[:, :queries]).sigmoid()
        return self.proj_drop(self.proj(y))


class FastMlp(Mlp):
    """timm's MLP by `vitlorafa.ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        first, act = self.fc1, self.act
        is_exact_gelu = type(act) is nn.GELU and act.approximate == "none"
        is_known = type(first) in (nn.Linear, FastLinear, LoRALinear)
        if not (is_exact_gelu and is_known) or _has_hooks(first) or _has_hooks(act):
            return super().forward(x)
        adapted = isinstance(first, LoRALinear)
        x = first(x, gelu=True) if adapted else linear(x, first.weight, first.bias, gelu=True)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


class ClassTokenBlock(Block):
    """timm's block, which can leave out tokens that nothing will read."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, queries: int | None = None
    ) -> Tensor:
        """[B, N, d] -> [B, N, d], or the first `queries` tokens of it."""
        if queries is None:
            return super().forward(x, **_given(attn_mask, is_causal))
        y = x[:, :queries] + self.drop_path1(self.ls1(self.attn(self.norm1(x), queries=queries)))
        return y + self.drop_path2(self.ls2(self.mlp(self.norm2(y))))


class ClassTokenTransformer(VisionTransformer):
    """timm's vision transformer, whose last block computes the class token alone while nothing else is pooled."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, channels, height, width] -> logits [B, num_classes]."""
        masks = _given(attn_mask, is_causal)
        pools_it = self.global_pool == "token" and self.attn_pool is None
        if masks or not pools_it or not isinstance(self.blocks[-1], ClassTokenBlock):
            return super().forward(x, **masks)
        return self.forward_head(self.class_token(x))

    def class_token(self, x: Tensor) -> Tensor:
        """`forward_features(x)[:, :1]`, which is all that `forward_head` reads, with less work.

        Args:
            x: Images, [B, channels, height, width].

        Returns:
            The class token behind the last norm, [B, 1, d].
        """
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        *blocks, last = self.blocks
        for block in (*blocks, partial(last, queries=1)):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return self.norm(x)


# What the forwards above make use of: a timm that has more in there is left alone.
_IN_ATTENTION = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
_IN_MLP = {"fc1", "act", "drop1", "norm", "fc2", "drop2"}
_IN_BLOCK = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_FAST: dict[type, tuple[type, set[str]]] = {Attention: (FastAttention, _IN_ATTENTION), Mlp: (FastMlp, _IN_MLP)}


def _ends_plainly(blocks: Any) -> bool:
    """Whether the last block is timm's own, with the attention from above."""
    if not len(blocks):
        return False
    last = blocks[-1]
    return type(last) is Block and isinstance(last.attn, FastAttention) and last._modules.keys() <= _IN_BLOCK


def _given(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """Those of timm's arguments that say something: older timms know no `is_causal`."""
    return {
        **({} if attn_mask is None else {"attn_mask": attn_mask}),
        **({"is_causal": True} if is_causal else {}),
    }
