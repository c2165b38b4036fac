"""The kernel of the adapted layer, y = x Wᵀ + b + s (x Aᵀ) Bᵀ.

Shapes: x [..., d_in]; weight [d_out, d_in]; A [k, r, d_in] and B [k, m, r] stack k projections that share one linear
layer. Projection j adds s (x A_jᵀ) B_jᵀ to the m outputs from starts[j] on, one of d_out/m equal parts. A plain linear
layer is k = 1, m = d_out, starts = (0,); the q and v slices of a fused qkv of width d are k = 2, m = d,
starts = (0, 2d).

`reference` is the definition, `autograd` decides what is kept from forward to backward, `eager` and `triton` compute
the steps, `dispatch` chooses between them. `stacked` is the layer with one of several B for each sample.
"""

from vitlorafa.ops.dispatch import lora_linear, use_backend
from vitlorafa.ops.linear import linear
from vitlorafa.ops.processor import autocast_dtype

__all__ = ["autocast_dtype", "linear", "lora_linear", "use_backend"]
