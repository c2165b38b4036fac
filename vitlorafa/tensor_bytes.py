"""A tensor's content as bytes, for digests."""

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The content of a dense tensor of any format, shape, layout and device.

    Args:
        tensor: Tensor to read; scalars and empty tensors are allowed. The bytes do not include format and shape.

    Returns:
        The elements in row-major order. Equal tensors of the same format have equal bytes.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data
