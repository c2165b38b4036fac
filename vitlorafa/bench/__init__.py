"""Time and memory of a training step: `python -m vitlorafa.bench` compares methods with each other and a lower bound.

The lower bound is what every adapter in all blocks has to compute and keep at least: the forward pass of the frozen
model and the gradients of its activations. Notation: a ViT block of width d with MLP ratio m and h heads runs on
T tokens (batch × N of each image); its linear layers have P = (4 + 2m) d² weights. K projections of r × (d_in + d_out)
weights each are adapted, with R weights in all. A multiplication or an addition is one operation; b is the number of
bytes of an element in the precision of the matmuls (2 under autocast). Attention and GELU use that precision too; the
residual stream and what LayerNorm saves stay in float32. For each block and step:

| | operations | bytes saved from forward to backward |
|---|---|---|
| forward | 2TP + 4TNd | |
| lower bound: forward, gradient of the block's input | 4TP + 14TNd | F = T (8d + (4 + m) d b + 4h + 16) |
| full fine-tuning | 6TP + 14TNd | F + T (2 + m) d b |
| LoRA in plain PyTorch | lower bound + 6TR | F + T (2 + m) d b + T K r b |
| LoRA-FA in plain PyTorch | lower bound + 4TR + 2T ∑ r d_out | F + T K r b |
| LoRA-FA (separate) | lower bound + 2TR + 2T ∑ r d_out + 2 ∑ r d_in d_out | F + T K r b |
| LoRA-FA | lower bound + 2TR + 2 ∑ r d_in d_out | F + T K r b |

"LoRA-FA", without an addition, is `vitlorafa` with `compute="folded"`: the update is merged into the weight once per
step. "(separate)" is `compute="separate"`: the update is computed next to the frozen layer. Attention is the fused
kernel: two matmuls forward, two backward for each of them, and the scores computed a second time (14TNd in all). It
saves its output anyway, so the input of `proj` costs LoRA no extra memory. `vitlorafa` computes the gradient of a
layer's input from W + s·B·A; the cost of forming that matrix does not grow with T. In float32 the folded way forms the
matrix twice instead of keeping it. In addition, a trained weight costs its gradient and AdamW's two moments: 12 bytes.

The exact numbers also include patch embedding, last norm, head and loss. Before the first adapted layer nothing needs a
gradient, so an adapter may keep less, and take less time, than these rows say. `vitlorafa.bench.formulas` counts all of
it; the tables print its numbers next to the measured ones.

How it is measured:

- Time: the models of all methods are in memory together and take steps interleaved, one step each per round, in an
  order that rotates from round to round. So a change in the machine's speed affects all methods alike. The ratio to the
  lower bound is the median of the ratios within each round; the ratio of medians is printed too. For the lower bound,
  the input of the first block requires a gradient. The optimizer is AdamW with `foreach`; PEFT's LoRA-FA has its own.
- Kept bytes: each storage that autograd saves counts once; parameters and buffers do not count. Measured at two batch
  sizes: what grows with the batch is activations, the rest is weights (cast copies, and W + s·B·A).
- The parts `methods` and `growth` also count weights, gradients and optimizer state, see `vitlorafa.bench.costs`. There
  the head trains in all rows but the lower bound.
- Peak memory: weights, gradients, optimizer state and activations, minus what the process held before the model was
  built. On a GPU, torch's own count; on a CPU, the resident size of a new process for each method.

PEFT cannot adapt the slices of a fused qkv: its LoRA there has rank r in all, that of the other methods rank r for each
of q, k and v.
"""
