"""An unpacked attention computes as torch's `nn.MultiheadAttention`."""

import copy

import pytest
import torch
from torch import nn

from vitlorafa.packed_attention import UnpackedAttention, is_packed, pack, unpack

pytestmark = pytest.mark.numbers


def both(**kwargs):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(12, 3, **kwargs).double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    other = copy.deepcopy(plain)
    unpack(other)
    assert isinstance(other, UnpackedAttention)
    return plain, other


def assert_same(plain, other, *inputs, **kwargs):
    for mode in (True, False):
        plain.train(mode)
        other.train(mode)
        outputs = []
        for attention in (plain, other):
            torch.manual_seed(1)  # of dropout
            outputs.append(attention(*inputs, **kwargs))
        torch.testing.assert_close(*outputs)


def masks(L, S, N=2, heads=3):
    boolean = torch.rand(L, S) < 0.3
    boolean[:, 0] = False
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, -2:] = True
    return {
        "none": {},
        "boolean": {"attn_mask": boolean},
        "added": {"attn_mask": torch.randn(L, S).double()},
        "each head": {"attn_mask": torch.randn(N * heads, L, S).double()},
        "padding": {"key_padding_mask": padding},
        "both": {"key_padding_mask": padding, "attn_mask": boolean},
        "added both": {"key_padding_mask": torch.randn(N, S).double(), "attn_mask": torch.randn(L, S).double()},
        "causal": {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(1), "is_causal": True},
    }


@pytest.mark.parametrize("mask", masks(5, 5))
@pytest.mark.parametrize("options", [{}, {"need_weights": False}, {"average_attn_weights": False}], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"batch_first": True}, {"bias": False}, {"dropout": 0.4}], ids=str)
def test_self_attention(kwargs, options, mask):
    plain, other = both(**kwargs)
    x = torch.randn(2, 5, 12).double() if plain.batch_first else torch.randn(5, 2, 12).double()
    assert_same(plain, other, x, x, x, **options, **masks(5, 5)[mask])


@pytest.mark.parametrize("mask", ["none", "boolean", "each head", "padding", "both"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_cross_attention(batch_first, mask):
    plain, other = both(batch_first=batch_first)
    q, k, v = (torch.randn(2, n, 12).double() for n in (4, 6, 6))
    inputs = [q, k, v] if batch_first else [each.transpose(0, 1) for each in (q, k, v)]
    assert_same(plain, other, *inputs, **masks(4, 6)[mask])
    assert_same(plain, other, inputs[0], inputs[1], inputs[1], **masks(4, 6)[mask])


@pytest.mark.parametrize("need_weights", [False, True])
def test_one_sample_without_a_batch(need_weights):
    plain, other = both()
    x = torch.randn(5, 12).double()
    assert_same(plain, other, x, x, x, need_weights=need_weights)
    padding = torch.tensor([False, False, True, False, True])
    assert_same(plain, other, x, x, x, need_weights=need_weights, key_padding_mask=padding)


def test_a_causal_hint_without_a_mask_is_the_same_error():
    plain, other = both()
    x = torch.randn(5, 2, 12).double()
    errors = []
    for attention in (plain, other):
        with pytest.raises(RuntimeError) as error:
            attention(x, x, x, is_causal=True)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_packed_again_it_is_the_same_object_with_the_same_parameters():
    plain = nn.MultiheadAttention(12, 3)
    before = dict(plain.named_parameters())
    holder = nn.Sequential(plain)
    unpack(plain)
    unpack(plain)  # nothing more
    assert dict(plain.named_parameters()).keys() == {
        "in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"
    }  # fmt: skip
    pack(holder)
    assert type(plain) is nn.MultiheadAttention and next(iter(plain._parameters)) == "in_proj_weight"
    after = dict(plain.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


@pytest.mark.parametrize(
    "attention",
    [
        nn.MultiheadAttention(12, 3, add_bias_kv=True),
        nn.MultiheadAttention(12, 3, add_zero_attn=True),
        nn.MultiheadAttention(12, 3, kdim=8, vdim=8),
        type("Own", (nn.MultiheadAttention,), {})(12, 3),
        nn.Linear(3, 3),
    ],
)
def test_others_stay_as_they_are(attention):
    kind = type(attention)
    unpack(attention)
    assert not is_packed(attention) and type(attention) is kind
