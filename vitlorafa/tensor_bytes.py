"""A tensor's content as bytes, to compute digests of."""

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The content of any dense tensor: of any format, shape, layout and device, scalars and empty ones included.

    Args:
        tensor: Tensor to read. Its format and shape are not in the bytes.

    Returns:
        Its elements in row-major order; equal tensors of one format have equal bytes.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data
