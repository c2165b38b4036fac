"""Bytes of tensors, for digests: any format, shape and layout."""

import pytest
import torch

from vitlorafa.tensor_bytes import tensor_bytes

FORMATS = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex64, torch.complex128, torch.int64, torch.uint8, torch.int8, torch.bool),
]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_scalars_empty_and_strided_tensors_have_the_bytes_of_their_elements(dtype):
    matrix = torch.tensor([[0, 1, 0], [1, 0, 1]]).to(dtype)
    assert len(tensor_bytes(matrix[0, 0])) == matrix.itemsize
    assert len(tensor_bytes(matrix[:0])) == 0
    assert tensor_bytes(matrix.T) == tensor_bytes(matrix.T.contiguous()) != tensor_bytes(matrix)


def test_lazily_conjugated_and_negated_tensors_have_the_bytes_of_their_values():
    values = torch.tensor([1 + 2j, 3 - 4j])
    assert tensor_bytes(values.conj()) == tensor_bytes(torch.tensor([1 - 2j, 3 + 4j]))
    assert tensor_bytes(values.conj().imag) == tensor_bytes(torch.tensor([-2.0, 4.0]))


def test_parameters_that_train_are_read_too():
    assert tensor_bytes(torch.nn.Parameter(torch.ones(2))) == tensor_bytes(torch.ones(2))
