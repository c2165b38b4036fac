"""Frozen weights in 8 or 4 bits, and the linear layer that computes with them.

| format | codes                                         | scales                                | bytes per weight |
|--------|-----------------------------------------------|---------------------------------------|------------------|
| int8   | 8 bits, from -127 to 127                      | one of 32 bits for each row           | 1 + 4/d_in       |
| nf4    | 4 bits, 16 quantiles of a normal distribution | one of 8 bits for each 64 weights [1] | 0.516            |

[1] And one of 32 bits for each 256 of these scales.

int8 has the rows of LLM.int8() (Dettmers et al. 2022), with inputs in floating point. nf4 is NormalFloat4 with double
quantisation (QLoRA, Dettmers et al. 2023, section 3). bitsandbytes quantises and dequantises.

A dequantised weight is never kept for backward: forward and backward dequantise it once each. That takes less than a
hundredth of the time of the layer's matmul.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitlorafa.errors import AdapterError
from vitlorafa.noise import silence_bitsandbytes
from vitlorafa.ops.linear import linear
from vitlorafa.ops.private import inside_torch_func
from vitlorafa.ops.processor import autocast_dtype

BLOCK, GROUP = 64, 256  # weights that share a scale in nf4, and scales that share one, as in QLoRA


# (tensors, shape of the weight, one of float32, bfloat16 and float16) -> the weight
Unpack = Callable[[tuple[Tensor, ...], tuple[int, int], torch.dtype], Tensor]


class QuantisedWeight(NamedTuple):
    """A frozen weight in fewer bits.

    Attributes:
        tensors: Codes and scales.
        shape: Shape of the weight, [d_out, d_in].
        dtype: Number format that the weight had.
        unpack: Function that computes the weight from the tensors, the shape and a number format.
    """

    tensors: tuple[Tensor, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    unpack: Unpack

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, [d_out, d_in], as a new tensor.

        Args:
            dtype: Number format, to which the float32 values are rounded once; if None, the one that the weight had.
        """
        dtype = dtype or self.dtype
        with torch.no_grad():
            direct = dtype in (torch.float32, torch.bfloat16, torch.float16)
            return self.unpack(self.tensors, self.shape, dtype if direct else torch.float32).to(dtype)


def dense(weight: Tensor | QuantisedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight as a tensor.

    Args:
        weight: Weight; a tensor is returned as it is.
        dtype: Number format of a weight that is dequantised; if None, the one that it had.
    """
    return weight.dequantise(dtype) if isinstance(weight, QuantisedWeight) else weight


def quantised_linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for a quantised W, which is dequantised in forward and again in backward.

    Args:
        x: Input, [..., d_in].
        weight: Quantised weight, [d_out, d_in].
        bias: Bias, [d_out], in any number format, or None.

    Returns:
        The output, [..., d_out], in autocast's dtype if enabled, otherwise in that of x.
    """
    x = x.to(autocast_dtype(x) or x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if inside_torch_func():
        return linear(x, weight.dequantise(x.dtype), bias)
    y: Tensor = _QuantisedLinear.apply(x, weight, bias)
    return y


class _QuantisedLinear(torch.autograd.Function):
    """The matmuls in backward are torch's own, so gradients can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight._replace(tensors=())
        ctx.save_for_backward(*weight.tensors)
        return linear(x, weight.dequantise(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        need_x, _, need_bias = ctx.needs_input_grad
        weight = ctx.weight._replace(tensors=ctx.saved_tensors)
        gx = g @ weight.dequantise(g.dtype) if need_x else None
        return gx, None, g.reshape(-1, g.shape[-1]).sum(0) if need_bias else None


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8 [d_out, d_in], and the largest absolute value of each row, float32 [d_out], on the CPU.

    Args:
        weight: Weight, [d_out, d_in].
    """
    codes, largest, _ = bitsandbytes().int8_vectorwise_quant(_plain(weight))
    return codes, largest


def quantise_nf4(weight: Tensor) -> tuple[Tensor, ...]:
    """Codes, their scales as codes of 8 bits, and what these stand for, on the CPU.

    Args:
        weight: Weight, [d_out, d_in].

    Returns:
        The tensors of `unpack_4bit`: codes of two weights each, uint8; the code of each block's scale, uint8; and in
        float32 the scale of each group of scales, their mean, which is subtracted from them, [1], and the values of the
        256 codes.
    """
    functional = bitsandbytes()
    flat = _plain(weight).reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK))
    codes, state = functional.quantize_4bit(flat, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    return codes.view(-1), state.absmax, state.state2.absmax, state.offset.view(1), state.state2.code


def unpack_int8(tensors: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight of `quantise_int8`'s tensors, or of bitsandbytes' `Linear8bitLt`.

    Args:
        tensors: Codes and largest absolute values.
        shape: Shape of the weight.
        dtype: One of float32, bfloat16 and float16.
    """
    codes, largest = tensors
    weight: Tensor = torch.ops.bitsandbytes.int8_vectorwise_dequant(codes.view(shape), largest)
    return weight.to(dtype)


def unpack_nf4(tensors: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight of `quantise_nf4`'s tensors.

    Args:
        tensors: Codes, scales, scales of groups of scales, their mean, and the values of the scales' codes.
        shape: Shape of the weight.
        dtype: One of float32, bfloat16 and float16.
    """
    return unpack_4bit(tensors, shape, dtype, BLOCK, "nf4", GROUP)


def unpack_4bit(
    tensors: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype, block: int, kind: str, group: int = 0
) -> Tensor:
    """The weight of bitsandbytes' 4-bit tensors.

    Args:
        tensors: Codes and the scale of each block, in float32; or codes, scales as codes of 8 bits, the scale of each
            group of scales, their offset, and the values of the 256 codes.
        shape: Shape of the weight.
        dtype: One of float32, bfloat16 and float16.
        block: Weights that share a scale.
        kind: "nf4" or "fp4".
        group: Scales that share a scale; 0 if scales are in float32.
    """
    codes, scales, *nested = tensors
    if group:
        group_scales, offset, values = nested
        scales = torch.ops.bitsandbytes.dequantize_blockwise(scales, group_scales, values, group, torch.float32)
        scales = scales + offset
    held = 2 * codes.numel() * codes.element_size()
    # As rows of one block: on CPUs with AVX512, bitsandbytes 0.50 dequantises rows of other widths wrongly.
    rows = (held // block, block) if held % block == 0 else (1, held)
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, block, kind, rows, dtype)
    return weight.view(-1)[: shape[0] * shape[1]].view(shape)


@cache
def bitsandbytes() -> Any:
    """The module `bitsandbytes.functional`; its import registers the operations that read a quantised weight.

    Raises:
        AdapterError: If bitsandbytes is not installed.
    """
    silence_bitsandbytes()
    try:
        return import_module("bitsandbytes.functional")
    except ImportError as error:
        raise AdapterError(f"quantised weights need bitsandbytes ({error}): pip install 'vitlorafa[quant]'") from error


def _plain(weight: Tensor) -> Tensor:
    """The weight on the CPU, so that codes do not depend on the device, in a format that bitsandbytes can read."""
    direct = weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return weight.detach().to("cpu", weight.dtype if direct else torch.float32).contiguous()
