"""What a run keeps of its predictions: the file, its rounding, and its errors."""

import math

import pytest
import torch

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.predictions import Part, Predictions, are_right, load_predictions, rounded, save_predictions


def make_part(names=("dog/a.png", "dog/ü\udcff.png", "house/b.png"), is_uda=None, seed=0):
    logits = torch.randn(len(names), 2, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([0, 0, 1])
    return Part(tuple(names), logits.half().float(), labels, torch.tensor([True, False, False]), is_uda)


def make_predictions(selection="best", step=7, **more):
    return Predictions(step, selection, {"A": make_part(**more), "C": make_part(seed=1)}, ("dog", "house"))


def are_same(one, other):
    assert (one.step, one.selection, one.classes, list(one.parts)) == (
        *(other.step, other.selection, other.classes),
        list(other.parts),
    )
    for label, part in one.parts.items():
        there = other.parts[label]
        assert part.names == there.names
        for name in ("logits", "labels", "is_held_out"):
            mine, theirs = getattr(part, name), getattr(there, name)
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    return True


def test_a_file_has_everything_of_the_images(tmp_path):
    written = make_predictions()
    save_predictions(tmp_path, written)
    assert are_same(load_predictions(tmp_path), written)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions_selected.safetensors"]


def test_the_last_step_has_a_file_of_its_own_only_where_another_is_selected(tmp_path):
    save_predictions(tmp_path, make_predictions())
    assert load_predictions(tmp_path, "last").step == 7
    save_predictions(tmp_path, make_predictions("last", step=9))
    assert load_predictions(tmp_path, "last").step == 9
    assert load_predictions(tmp_path).step == 7


def test_accuracies_are_those_of_each_split(tmp_path):
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [math.nan, 1.0]])
    labels, held_out = torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, False, False])
    is_uda = torch.tensor([False, False, False, True])
    part = Part(("a", "b", "c", "d"), logits, labels, held_out, is_uda)
    save_predictions(tmp_path, Predictions(0, "best", {"A": part}, ("x", "y")))
    accuracies = load_predictions(tmp_path).accuracies()
    assert math.isnan(accuracies.pop("env0_uda_acc"))
    assert accuracies == {"env0_out_acc": 1.0, "env0_in_acc": 0.5}


@pytest.mark.parametrize(
    "row", [[1.0, 1.0001], [-1.0, -0.9999], [0.0, 1e-9], [-1e-9, 0.0], [7e4, 8e4], [-8e4, -7e4], [3.0, 1.0, 3.0001]]
)
def test_rounding_keeps_the_predicted_class(row):
    logits = torch.tensor([row])
    assert logits.half().argmax() != logits.argmax()  # without care it does not
    assert rounded(logits).argmax() == logits.argmax()
    assert rounded(logits).isfinite().all()
    assert logits.tolist() == torch.tensor([row]).tolist()


def test_rounding_keeps_what_is_not_finite():
    logits = torch.tensor([[math.inf, 1.0], [math.nan, 1.0], [-math.inf, 1.0]])
    torch.testing.assert_close(rounded(logits), logits.half(), rtol=0, atol=0, equal_nan=True)
    right = are_right(rounded(logits).float(), torch.tensor([0, 0, 1]))
    assert right[:2].isnan().all() and right[2] == 1


def test_a_run_without_predictions_names_the_command_that_adds_them(tmp_path):
    with pytest.raises(BenchmarkError, match=r"keeps no predictions: add them with .*evaluate --run .* --predictions"):
        load_predictions(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "predictions_selected.safetensors").write_bytes(content)
    with pytest.raises(BenchmarkError, match=r"predictions_selected.safetensors cannot be read .* --predictions"):
        load_predictions(tmp_path)
