"""torch's `nn.MultiheadAttention`, which packs the weights of q, k and v in one parameter, with a layer for them.

Adapters replace linear layers, but `nn.MultiheadAttention` has none for q, k and v: it reads `in_proj_weight` itself,
and the weight of `out_proj` without calling the layer. `unpack` gives an attention a linear layer `in_proj` that shares
the parameter and is called, as is `out_proj`; the attention computes the same. `pack` undoes it.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vitlorafa.wrappers import named_modules

INPUT, OUTPUT = "in_proj", "out_proj"  # the linear layers of an unpacked attention


class UnpackedAttention(nn.MultiheadAttention):
    """torch's attention, which calls its linear layers `in_proj` and `out_proj`, so that these can be adapted.

    `in_proj_weight` and `in_proj_bias` are the layer's effective ones. The fast path of `nn.TransformerEncoderLayer`,
    which calls no layer in evaluation, reads them, and so computes with the adapters too.

    Attributes:
        in_proj: Linear layer that computes q, k and v, stacked.
    """

    in_proj: Any

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        """The weight of `in_proj` with its update, [3·d, d]."""
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias of `in_proj`, [3·d], or None."""
        return self.in_proj.bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`, with the same arguments and results.

        Args:
            query: Queries, [L, N, d], or [N, L, d] if `batch_first`, or [L, d].
            key: Keys, as the queries, with S instead of L.
            value: Values, as the keys.
            key_padding_mask: Keys to ignore, [N, S] or [S]: True, or a number that is added.
            need_weights: Whether to return the attention weights.
            attn_mask: Keys to ignore by query, [L, S] or [N·heads, L, S]: True, or a number that is added.
            average_attn_weights: Whether to return the mean of the weights over the heads.
            is_causal: Hint that `attn_mask`, which has to be given, is the causal mask.

        Returns:
            The output, of the shape of the queries, and the attention weights, [N, L, S] or [N, heads, L, S], or None.
        """
        if query.is_nested or (is_causal and attn_mask is None):
            return super().forward(  # torch's own, by the effective weights: only its fast path takes nested tensors
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        is_batched = query.dim() == 3
        q, k, v = (self._split(each, is_batched) for each in self._project(query, key, value))
        N, _, L, d = q.shape
        mask = None if key_padding_mask is None else _added(key_padding_mask, q).reshape(N, 1, 1, -1)
        if attn_mask is not None:
            each = _added(attn_mask, q)
            each = each if each.dim() == 2 else each.reshape(N, self.num_heads, L, -1)
            mask = each if mask is None else mask + each
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(d)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        y = y.squeeze(0) if not is_batched else y if self.batch_first else y.transpose(0, 1)
        if not need_weights:
            return y, None
        weights = weights.mean(1) if average_attn_weights else weights
        return y, weights if is_batched else weights.squeeze(0)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Projected queries, keys and values."""
        if query is key and key is value:
            return self.in_proj(query).chunk(3, dim=-1)
        return tuple(self.in_proj(x).chunk(3, dim=-1)[part] for part, x in enumerate((query, key, value)))

    def _split(self, x: Tensor, is_batched: bool) -> Tensor:
        """[N, L, d], [L, N, d] or [L, d] -> [N, heads, L, d/heads]."""
        x = x.unsqueeze(0) if not is_batched else x if self.batch_first else x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def is_packed(module: nn.Module) -> bool:
    """Whether it is a packed attention that `unpack` can change: torch's own class, without options that ViTs lack.

    Args:
        module: Any module.
    """
    return (
        type(module) is nn.MultiheadAttention
        and module.in_proj_weight is not None
        and module.bias_k is None
        and module.bias_v is None
        and not module.add_zero_attn
    )


def input_projection(attention: Any) -> Any:
    """The linear layer of q, k and v; for a packed attention, one that shares its parameters.

    Args:
        attention: Attention, packed or not.
    """
    if isinstance(attention, UnpackedAttention):
        return attention.in_proj
    d = attention.embed_dim
    linear = nn.Linear(d, 3 * d, bias=False, device="meta")
    linear.weight, linear.bias = attention.in_proj_weight, attention.in_proj_bias
    return linear.train(attention.training)


def unpack(module: nn.Module) -> None:
    """Gives a packed attention a linear layer `in_proj`, in place; other modules stay as they are.

    Args:
        module: Any module.
    """
    if not is_packed(module):
        return
    layer = input_projection(module)
    # None keeps the places of the parameters, so that `pack` restores their order too.
    module._parameters |= {"in_proj_weight": None, "in_proj_bias": None}
    module._modules = {INPUT: layer, **module._modules}
    module.__class__ = UnpackedAttention


def pack(model: nn.Module) -> None:
    """Undoes `unpack` in all attentions of a model whose layers are plain ones again.

    Args:
        model: Any module.
    """
    module: Any
    for _, module in named_modules(model):
        if isinstance(module, UnpackedAttention) and type(module.in_proj) is nn.Linear and _is_plain(module.out_proj):
            layer: Any = module._modules.pop(INPUT)
            module._parameters |= {"in_proj_weight": layer.weight, "in_proj_bias": layer.bias}
            module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]


def _is_plain(layer: Any) -> bool:
    return type(layer) in (nn.Linear, NonDynamicallyQuantizableLinear)


def _added(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as numbers that are added to scores."""
    if mask.is_floating_point():
        return mask.to(x.dtype)
    return torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask.bool(), -math.inf)
