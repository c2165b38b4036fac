"""How fast and how lean training is: `python -m vitlorafa.bench`, against the floor and against peers.

The floor first. A ViT block of width d, MLP ratio m, h heads, on T tokens (batch × N of each image) has linear layers
of P = (4 + 2m) d² weights. An operation is a multiplication or an addition; b is the bytes of an element in the
products' precision (2 under autocast), in which attention and GELU then compute too, while the residual stream and
what LayerNorm keeps stay in float32. K projections of r × (d_in + d_out) weights each, R in all, are adapted. Per
block and step:

| | operations | bytes kept from forward to backward |
|---|---|---|
| forward | 2TP + 4TNd | |
| floor: forward, gradient of the block's input | 4TP + 14TNd | F = T (8d + (4 + m) d b + 4h + 16) |
| full fine-tuning | 6TP + 14TNd | F + T (2 + m) d b |
| LoRA in plain torch | floor + 6TR | F + T (2 + m) d b + T K r b |
| LoRA-FA in plain torch | floor + 4TR + 2T ∑ r d_out | F + T K r b |
| LoRA-FA, ours, separate | floor + 2TR + 2T ∑ r d_out + 2 ∑ r d_in d_out | F + T K r b |
| LoRA-FA, ours, folded | floor + 2TR + 2 ∑ r d_in d_out | F + T K r b |

Attention is the fused one: two products forward, two more for each of them backward, and the scores once again
(14TNd in all); its output is kept anyway, so that the input of `proj` costs LoRA nothing more. Ours takes the gradient
of a layer's input from W + s B A, whose price does not grow with T; in float32 the folded way forms that twice rather
than keep it. Beside this a weight that trains costs its gradient and AdamW's two moments, 12 bytes.

To be exact the patch embedding, the last norm, the head and the loss come on top; and in front of the first adapted
layer nothing needs a gradient, which is why an adapter may keep less than the floor, and take less than these rows
say. `vitlorafa.bench.floors` counts all of it, and the tables print its numbers beside measured ones.

How it is measured:

- Time: all methods' models live side by side and take one step each in turn, in an order that rotates from round to
  round, so that a change in the machine's speed falls on all. A ratio to the floor is taken within each round, and
  its median told, beside the ratio of medians. The floor is the frozen model itself, whose first block's input
  requires a gradient. The optimizer is AdamW over tensors at once; PEFT's LoRA-FA brings its own.
- Kept bytes: every storage that autograd saves, once, without parameters and buffers. Measured at two batch sizes:
  what grows with the batch is activations, the rest is weights (cast copies, and W + s B A).
- Peak memory: weights, gradients, optimizer and activations, over what the process held before the model was built.
  On a GPU torch's own count; on a CPU the resident size of a fresh process for each method.

PEFT cannot adapt slices of a fused qkv: its LoRA there is one of rank r, where the others' are three.
"""
