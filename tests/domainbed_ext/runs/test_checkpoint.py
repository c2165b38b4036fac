import math
import random

import numpy as np
import pytest
import torch

from domainbed_ext.runs import checkpoint

STATE = {
    "tensors": {"a": torch.randn(3, 2), "b": torch.randn(4).bfloat16(), "c": torch.tensor(3), "d": torch.empty(0)},
    3: ("tuple", [1, 2.5, None, True], {"nested": (0.1 + 0.2, math.inf)}),
    "array": np.arange(5, dtype=np.uint32),
}  # fmt: skip


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and (one == other).all()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_a_checkpoint_gives_back_what_was_saved(tmp_path):
    assert checkpoint.load(tmp_path) == (None, [])
    checkpoint.save(tmp_path, 3, STATE)
    state, complaints = checkpoint.load(tmp_path)
    assert same(state, STATE) and not complaints


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3),
        torch.tensor(True),
        torch.tensor(2.5, dtype=torch.float64),
        torch.empty(0, 3),
        torch.randn(2, 3).bfloat16().T,
        torch.randn(1, 2, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(1).expand(3),
        torch.randn(3).to(torch.float8_e4m3fn),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.randn(2, 3, dtype=torch.complex128).conj().T,
        torch.randn(3, dtype=torch.complex64).conj().imag,
        torch.tensor([1, 2], dtype=torch.uint16),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch."),
)
def test_tensors_of_any_format_shape_and_layout_are_saved(tmp_path, tensor):
    checkpoint.save(tmp_path, 1, {"tensor": tensor})
    state, complaints = checkpoint.load(tmp_path)
    assert not complaints and state["tensor"].dtype == tensor.dtype
    assert state["tensor"].tolist() == tensor.tolist()


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    checkpoint.save(tmp_path, 1, {"base": base, "transposed": base.T, "row": base[1]})
    state, _ = checkpoint.load(tmp_path)
    assert torch.equal(state["transposed"], base.T) and torch.equal(state["row"], base[1])


def test_two_are_kept_and_the_newest_is_loaded(tmp_path):
    for step in (9, 10, 200):
        checkpoint.save(tmp_path, step, {"step": step})
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoint.load(tmp_path)[0] == {"step": 200}
    checkpoint.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "flipped tensor", "flipped text", "empty", "pickle"])
def test_a_broken_one_is_named_and_the_one_before_is_loaded(tmp_path, damage):
    checkpoint.save(tmp_path, 1, {"weights": torch.zeros(100), "name": "first"})
    checkpoint.save(tmp_path, 2, {"weights": torch.ones(100), "name": "second"})
    path = tmp_path / "checkpoint_00000002.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-50]
    elif damage == "flipped tensor":
        content[-7] ^= 1
    elif damage == "flipped text":
        content = content.replace(b"second", b"sEcond")
    else:
        content = b"" if damage == "empty" else b"\x80\x04K\x01."
    path.write_bytes(content)
    state, complaints = checkpoint.load(tmp_path)
    assert state["name"] == "first" and not state["weights"].any()
    assert len(complaints) == 1 and complaints[0].startswith("checkpoint_00000002.safetensors cannot be read (")
    assert checkpoint.load(tmp_path)[1] == []  # it is gone


def test_what_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"step": 1})

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise checkpoint.SafetensorError("IO error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.save(tmp_path, 2, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_00000001.safetensors"]


def test_what_it_cannot_hold_is_named(tmp_path):
    with pytest.raises(TypeError, match="cannot hold a set"):
        checkpoint.save(tmp_path, 1, {"a": {1, 2}})


def test_random_generators_go_on_where_they_were(tmp_path):
    draw = lambda: (random.random(), np.random.rand(), torch.rand(2).tolist(), np.random.randn())  # noqa: E731
    draw()
    checkpoint.save(tmp_path, 1, checkpoint.random_states())
    expected = draw()
    checkpoint.set_random_states(checkpoint.load(tmp_path)[0])
    assert draw() == expected
