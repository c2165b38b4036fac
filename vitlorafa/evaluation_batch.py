"""The number of images in a batch with which a vision transformer is evaluated fastest."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitlorafa.ops.processor import autocast_dtype
from vitlorafa.tuning import Question, Trials, choose, describe, sampler

DEFAULT = 64
SIZES = (DEFAULT, 32, 128, 16)


def fastest_evaluation_batch(model: nn.Module) -> int:
    """The batch size with the least time per image, found by timing one block (see `vitlorafa.tuning`).

    Larger batches use a processor's cores better, smaller ones its caches.

    Args:
        model: Vision transformer of timm on a CPU, with adapters or without; for other models and devices, and if a
            block takes too long to be timed, the size is 64. Autocast is taken into account.
    """
    parameter = next(model.parameters(), None)
    if not isinstance(model, VisionTransformer) or parameter is None or not parameter.is_cpu or not len(model.blocks):
        return DEFAULT
    vit: Any = model
    N, d = vit.patch_embed.num_patches + vit.num_prefix_tokens, vit.embed_dim
    dtype = autocast_dtype(torch.empty(0, dtype=parameter.dtype)) or parameter.dtype
    details = describe(dtype, f"{N} tokens of {d}", torch.get_num_threads())
    ways = tuple(map(str, SIZES))
    question = Question("evaluation_batch", details, ways, seconds=0.03, matters=N * d * d >= 2**20)
    return int(choose(question, partial(_trials, vit.blocks[0], N, d, dtype)))


def _trials(block: nn.Module, N: int, d: int, dtype: torch.dtype) -> Trials:
    block = copy.deepcopy(block).eval()  # whose hooks and counters the user does not see
    x = sampler(torch.float32)(max(SIZES), N, d)

    def compute(size: int) -> float:
        """Returns how much was computed, relative to the smallest batch."""
        low = dtype != torch.float32
        with torch.inference_mode(), torch.autocast("cpu", dtype if low else torch.bfloat16, enabled=low):
            block(x[:size])
        return size / min(SIZES)

    def sample(size: int) -> Callable[[], float]:
        return partial(compute, size)

    compute(min(SIZES))  # answers the questions of attention and linear layers first
    return {str(size): sample(size) for size in sorted(SIZES)}
