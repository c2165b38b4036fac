"""Operations and kept bytes of one training step by formula; `vitlorafa.bench` explains the formulas."""

from dataclasses import dataclass, replace
from typing import Any

from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

LINEARS = {"qkv": ("q", "k", "v"), "proj": ("proj",), "fc1": ("fc1",), "fc2": ("fc2",)}  # linear layer -> its targets


@dataclass(frozen=True)
class Stack:
    """The sizes of a plain vision transformer that determine the cost of a step.

    Attributes:
        depth: Number of blocks.
        dim: Width d.
        hidden: Hidden width of an MLP.
        heads: Number of attention heads.
        tokens: Number of tokens of an image, N, with class token and registers.
        patches: Number of patches of an image.
        patch_inputs: Number of values in a patch.
        classes: Number of outputs of the head.
        batch: Number of images.
        element: Bytes b of an element in the precision of the matmuls.
        fused: Whether attention is one kernel that keeps no scores.
    """

    depth: int
    dim: int
    hidden: int
    heads: int
    tokens: int
    patches: int
    patch_inputs: int
    classes: int
    batch: int
    element: int
    fused: bool = True

    @classmethod
    def of(cls, model: nn.Module, batch: int, element: int) -> "Stack | None":
        """The sizes of a timm model; None if it does not consist of plain blocks only.

        Args:
            model: Model without adapters.
            batch: Number of images.
            element: Bytes of an element in the precision of the matmuls.
        """
        vit: Any = model
        if type(model) is not VisionTransformer or not all(map(_is_plain, vit.blocks)):
            return None
        if not all(isinstance(layer, nn.Identity) for layer in (vit.norm_pre, vit.fc_norm)):
            return None
        attention, mlp, embedding = vit.blocks[0].attn, vit.blocks[0].mlp, vit.patch_embed
        return cls(
            depth=len(vit.blocks),
            dim=attention.proj.in_features,
            hidden=mlp.fc2.in_features,
            heads=attention.num_heads,
            tokens=embedding.num_patches + vit.num_prefix_tokens,
            patches=embedding.num_patches,
            patch_inputs=embedding.proj.weight[0].numel(),
            classes=vit.head.out_features,
            batch=batch,
            element=element,
            fused=attention.fused_attn,
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of the linear layers of a block, in the order of computation."""
        d, hidden = self.dim, self.hidden
        return {"qkv": (d, 3 * d), "proj": (d, d), "fc1": (d, hidden), "fc2": (hidden, d)}

    @property
    def rows(self) -> int:
        """Number of tokens of the batch, T."""
        return self.batch * self.tokens


@dataclass(frozen=True)
class Adapter:
    """The properties of an adapter that determine the cost of a step.

    Attributes:
        rank: Rank r.
        targets: Adapted projections.
        train: Factors that train: "B", "A" or "BA".
        way: How the layer computes: "folded" or "separate" as in `AdapterConfig.compute`, or "plain" for the same
            formula written in plain PyTorch.
        peft: Whether the adapter is PEFT's. PEFT gives a fused qkv one adapter of rank r instead of one for each slice,
            and makes its own copy of an input that autocast has cast.
    """

    rank: int
    targets: tuple[str, ...]
    train: str = "B"
    way: str = "separate"
    peft: bool = False

    def projections(self, linear: str) -> int:
        """The number of adapted projections of a linear layer."""
        count = len(set(LINEARS[linear]) & set(self.targets))
        return min(count, 1) if self.peft else count

    @property
    def first(self) -> str:
        """The adapted linear layer that is computed first."""
        return next(linear for linear in LINEARS if self.projections(linear))


def forward_flops(stack: Stack) -> int:
    """Operations of the forward pass."""
    block = _linear_flops(stack, *LINEARS) + 4 * stack.rows * stack.tokens * stack.dim
    return stack.depth * block + _patch_flops(stack) + head_flops(stack)


def lower_bound_flops(stack: Stack) -> int:
    """Operations of the forward pass and of the gradient of the first block's input."""
    block = _linear_flops(stack, *LINEARS) + _attention_backward_flops(stack)
    return forward_flops(stack) + stack.depth * block + head_flops(stack)


def full_flops(stack: Stack) -> int:
    """Operations of full fine-tuning; the images need no gradient."""
    weights = stack.depth * _linear_flops(stack, *LINEARS) + _patch_flops(stack) + head_flops(stack)
    return lower_bound_flops(stack) + weights


def adapter_flops(stack: Stack, adapter: Adapter) -> int:
    """Operations with an adapter in every block, a frozen head and no dropout."""
    order = list(LINEARS)
    first = order[: order.index(adapter.first) + 1]  # in the first block, their inputs need no gradient
    saved = _linear_flops(stack, *first) + (adapter.first != "qkv") * _attention_backward_flops(stack)
    total = lower_bound_flops(stack) - saved
    for linear, (d_in, d_out) in stack.linears.items():
        if count := adapter.projections(linear):
            m = d_out // 3 if linear == "qkv" and not adapter.peft else d_out
            blocks = stack.depth - (linear == adapter.first)  # where the input's gradient is needed
            total += _update_flops(stack, adapter, count * adapter.rank, d_in, m, blocks)
    return total


def lower_bound_saved(stack: Stack) -> int:
    """Bytes of activations that the lower bound keeps."""
    block = 2 * _norm_saved(stack) + _attention_saved(stack) + stack.rows * stack.hidden * stack.element
    return stack.depth * block + _norm_saved(stack) + _loss_saved(stack)


def full_saved(stack: Stack) -> int:
    """Bytes of activations that full fine-tuning keeps: those of the lower bound and the input of every layer."""
    inputs = stack.depth * sum(_input_saved(stack, linear) for linear in LINEARS)
    return lower_bound_saved(stack) + inputs + _images_saved(stack) + head_saved(stack)


def head_saved(stack: Stack) -> int:
    """Additional bytes where the head trains: its input."""
    # In float32 it is a view into all tokens; under autocast it is a copy of one token per image.
    return (stack.rows if stack.element == 4 else stack.batch) * stack.dim * stack.element


def head_flops(stack: Stack) -> int:
    """Operations of one matmul with the head's weight; the gradient of a trained head is one more of them."""
    return 2 * stack.batch * stack.dim * stack.classes


def probe_flops(stack: Stack) -> int:
    """Operations of a linear probe: the forward pass and the gradient of the head's weight."""
    return forward_flops(stack) + head_flops(stack)


def probe_saved(stack: Stack) -> int:
    """Bytes that a linear probe keeps: the input of the head, and the loss."""
    return head_saved(stack) + _loss_saved(stack)


def norm_tuning_saved(stack: Stack) -> int:
    """Bytes of activations kept where all norms and the head train: the inputs of norms are kept anyway."""
    return lower_bound_saved(stack) + head_saved(stack)


def bias_saved(stack: Stack) -> int:
    """Bytes of activations kept where all biases and the head train.

    A bias needs no input, but torch keeps that of a convolution, here the images.
    """
    return norm_tuning_saved(stack) + _images_saved(stack)


def last_blocks_saved(stack: Stack, n: int) -> int:
    """Bytes of activations kept where the last n blocks train; those before them need no gradient."""
    trained = replace(stack, depth=min(n, stack.depth))
    inputs = trained.depth * sum(_input_saved(stack, linear) for linear in LINEARS)
    return lower_bound_saved(trained) + inputs + head_saved(stack)


def adapter_saved(stack: Stack, adapter: Adapter) -> int:
    """Bytes of activations kept with an adapter in every block and a frozen head; dropout only with our own kernel."""
    total = lower_bound_saved(stack) - _norm_saved(stack)  # the first block's first norm needs no gradient
    if adapter.first != "qkv":
        total -= _attention_saved(stack)
    if adapter.first in ("fc1", "fc2"):
        total -= _norm_saved(stack)
    if adapter.first == "fc2":
        total -= stack.rows * stack.hidden * stack.element
    total += rank_saved(stack, adapter)
    if "A" in adapter.train:
        total += stack.depth * sum(_input_saved(stack, linear) for linear in LINEARS if adapter.projections(linear))
        if adapter.projections("proj"):
            # Its input is the output of attention, which is kept already, except where attention needs no gradient.
            copies = stack.depth if adapter.peft and stack.element < 4 else int(adapter.first == "proj")
            total += copies * stack.rows * stack.dim * stack.element
    return total


def rank_saved(stack: Stack, adapter: Adapter) -> int:
    """Bytes of x Aᵀ, which is kept where B trains."""
    count = sum(adapter.projections(linear) for linear in LINEARS) if "B" in adapter.train else 0
    return stack.depth * stack.rows * count * adapter.rank * stack.element


def _update_flops(stack: Stack, adapter: Adapter, rank: int, d_in: int, m: int, with_input: int) -> int:
    """Operations of one linear layer's adapters in all blocks; `with_input` blocks need the gradient of its input."""
    down, up = 2 * stack.rows * rank * d_in, 2 * stack.rows * rank * m  # matmuls of all tokens with A and with B
    weight = 2 * rank * m * d_in  # B A
    train_A, train_B = "A" in adapter.train, "B" in adapter.train
    factors = stack.depth * (up * train_B + down * train_A)
    at_xA = up * (stack.depth if train_A else with_input)  # the gradient at x Aᵀ
    if adapter.way == "plain":
        return factors + stack.depth * (down + up) + at_xA + with_input * down
    factors += stack.depth * up * train_A
    if adapter.way == "separate":
        return factors + stack.depth * (down + up) + with_input * weight
    # In float32 the folded weight is recomputed instead of being kept.
    times = stack.depth + (with_input if stack.element == 4 else 0)
    return factors + times * weight + stack.depth * down * train_B


def _is_plain(block: Any) -> bool:
    if type(block) is not Block or type(block.mlp) is not Mlp or not isinstance(block.mlp.act, nn.GELU):
        return False
    attention = block.attn
    optional = (block.ls1, block.ls2, attention.q_norm, attention.k_norm, block.mlp.norm)
    extras = [getattr(attention, name, None) for name in ("norm", "gate")]  # of newer versions of timm
    return all(isinstance(layer, nn.Identity) for layer in optional) and all(
        layer is None or isinstance(layer, nn.Identity) for layer in extras
    )


def _linear_flops(stack: Stack, *names: str) -> int:
    """One matmul of all tokens with the weights of the named linear layers of a block."""
    return 2 * stack.rows * sum(d_in * d_out for name, (d_in, d_out) in stack.linears.items() if name in names)


def _attention_backward_flops(stack: Stack) -> int:
    return (10 if stack.fused else 8) * stack.rows * stack.tokens * stack.dim


def _patch_flops(stack: Stack) -> int:
    return 2 * stack.batch * stack.patches * stack.patch_inputs * stack.dim


def _norm_saved(stack: Stack) -> int:
    """Input, mean and reciprocal standard deviation, in float32."""
    return stack.rows * (4 * stack.dim + 8)


def _images_saved(stack: Stack) -> int:
    return stack.batch * stack.patches * stack.patch_inputs * stack.element


def _loss_saved(stack: Stack) -> int:
    return stack.batch * (4 * stack.classes + 8)


def _attention_saved(stack: Stack) -> int:
    """q, k, v and the output, and for each head the logarithm of the sum in float32."""
    return stack.rows * (4 * stack.dim * stack.element + 4 * stack.heads)


def _input_saved(stack: Stack, linear: str) -> int:
    """Additional bytes for a linear layer's input; attention keeps its own output, which is the input of `proj`."""
    return 0 if linear == "proj" else stack.rows * stack.linears[linear][0] * stack.element
